"""Which networks do a recipe's rewards stand on? Equal ones are loaded once, however many rewards read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bpgo_video.rewards.base import FrameSampling

Dtype = Literal["float32", "bfloat16", "float16"]
WITHOUT_WEIGHTS = ("*.json", "*.txt", "*.jinja")  # files of a model folder that hold configuration and tokenizer
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Backbone:
    """A frozen network, and what it is: class, where its weights lie, dtype, device.

    The key is also the first part of the key of features that rewards share (`Clips.once`).
    """

    network: Any  # a transformers model: its features are methods that nn.Module does not have
    key: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype


class Backbones:
    """The networks of a run. A reward's constructor that takes `backbones` is given the run's one."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, ...], Backbone] = {}

    def load(
        self,
        network: Any,
        folder: Path,
        device: torch.device | str,
        dtype: str,
        unread: Sequence[str] = (),
    ) -> Backbone:
        """The model class `network` with the weights of `folder`.

        Args:
            unread: prefixes of parameters that the reward does not use: they may be missing.

        Raises:
            ValueError: the folder lacks weights, or `dtype` is no name of `DTYPES`.
        """

        def build(torch_dtype: torch.dtype) -> nn.Module:
            return complete(
                folder, unread, *network.from_pretrained(folder, dtype=torch_dtype, output_loading_info=True)
            )

        return self.once((network.__name__, str(folder.resolve())), device, dtype, build)

    def once(
        self,
        source: tuple[str, ...],
        device: torch.device | str,
        dtype: str,
        build: Callable[[torch.dtype], nn.Module],
    ) -> Backbone:
        """`build(dtype)` on `device`, frozen, or what it gave before for the same source, dtype and device."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype = {dtype!r}: must be one of {sorted(DTYPES)}")
        key = (*source, dtype, str(torch.device(device)))
        if key not in self._loaded:
            # Only the device: a cast would also round the buffers that a model keeps in fp32 (rotary frequencies).
            self._loaded[key] = Backbone(build(DTYPES[dtype]).to(device).eval().requires_grad_(False), key)
        return self._loaded[key]


def complete(source: Path, unread: Sequence[str], model: nn.Module, loading: dict[str, Any]) -> nn.Module:
    """The model, if all of it was in the checkpoint: transformers draws missing weights at random, with a warning.

    Raises:
        ValueError: names the first of the missing weights.
    """
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(tuple(unread)))
    if missing or loading["mismatched_keys"]:
        wrong = missing or sorted(str(key) for key in loading["mismatched_keys"])
        raise ValueError(
            f"{source} does not hold a whole {type(model).__name__}: {len(wrong)} weights are missing or of another "
            f"shape, the first is {wrong[0]}; is it the checkpoint of another class?"
        )
    return model


def from_weights(network: Any, config: Any, weights: dict[str, Tensor], source: Path, dtype: torch.dtype) -> nn.Module:
    """The model class `network` of `config` with weights that were converted from the file `source`.

    Raises:
        ValueError: weights are missing, of another shape, or of no use.
    """
    model, loading = network.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    if loading["unexpected_keys"]:
        raise ValueError(
            f"{source} holds weights that {network.__name__} lacks: {sorted(loading['unexpected_keys'])[:3]}"
        )
    return complete(source, (), model, loading)


def version(fingerprints: Sequence[str], frames: FrameSampling, dtype: str, *settings: object) -> str:
    """Which files were read, the sampling, the settings, and the dtype where it is not fp32: a score's identity."""
    rest = [sha256("\0".join(map(str, settings)).encode()).hexdigest()[:16]] if settings else []
    rest += [] if dtype == "float32" else [dtype]
    return "-".join([*fingerprints, str(frames), *rest])
