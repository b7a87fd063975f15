"""Networks that rewards share: loaded once per recipe, with their features of frames and videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoTokenizer

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.base import Clips, Device, FrameReward, FrameSampling
from bpgo_video.rewards.checkpoints import complete
from bpgo_video.rewards.preprocessing import Preprocessing

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WITHOUT_WEIGHTS = ("*.json", "*.txt", "*.jinja")  # files of a model folder that hold configuration and tokenizer
FRAMES_AT_ONCE = 64  # frames copied, resized and encoded at a time: 8 clips of 81 frames at 480x832 in fp32 are 3.1 GB


@dataclass(frozen=True)
class Backbone:
    """A frozen network with its key: class, folder, dtype and device. Shared features are cached under the key."""

    network: Any  # a transformers model: its features are methods that nn.Module does not have
    key: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def frame_features(
        self, clips: Clips, indices: Sequence[int], preprocessing: Preprocessing, encode: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "samples scored dim"]:
        """`encode` of the given frames, fp32; computed once for all rewards that read this network in this way."""

        def compute() -> Tensor:
            pairs = torch.cartesian_prod(torch.arange(len(clips)), torch.tensor(indices))
            rows = []
            for chosen in pairs.split(FRAMES_AT_ONCE):
                frames = clips.videos[chosen[:, 0], chosen[:, 1]].to(self.device)
                rows.append(encode(preprocessing(frames).to(self.dtype)).float())
            return torch.cat(rows).unflatten(0, (len(clips), len(indices)))

        return clips.once((self.key, preprocessing, tuple(indices)), compute)

    def video_features(
        self, clips: Clips, indices: Sequence[int], preprocessing: Preprocessing,
        encode: Callable[[Tensor, slice], Tensor],
    ) -> Float[Tensor, "samples ..."]:  # fmt: skip
        """`encode(pixels, rows)` of the given frames, a few videos at a time, fp32."""
        at_once = max(1, FRAMES_AT_ONCE // len(indices))
        found = []
        for start in range(0, len(clips), at_once):
            rows = slice(start, min(start + at_once, len(clips)))
            frames = clips.videos[rows][:, list(indices)].to(self.device)
            pixels = preprocessing(frames.flatten(0, 1)).to(self.dtype)
            found.append(encode(pixels.unflatten(0, frames.shape[:2]), rows).float())
        return torch.cat(found)

    def tokenizer(self, folder: Path, padding: str) -> Callable[[Sequence[str]], Any]:
        """Texts -> `input_ids` and `attention_mask`, cut to the network's length.

        Args:
            padding: "longest" of the texts, or "max_length", the network's own.
        """
        tokenize: Any = AutoTokenizer.from_pretrained(folder)
        length = self.network.config.text_config.max_position_embeddings
        settings = {"padding": padding, "truncation": True, "max_length": length, "return_tensors": "pt"}
        return lambda texts: tokenize(list(texts), **settings).to(self.device)


class Backbones:
    """The networks of a run, each loaded once. Constructors of rewards that take `backbones` receive it."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, ...], Backbone] = {}

    def load(self, network: Any, folder: Path, device: Device, dtype: str, unused: Sequence[str] = ()) -> Backbone:
        """The transformers class `network` with the weights of `folder`.

        Args:
            unused: prefixes of parameters that the reward does not use: the folder may lack them.

        Raises:
            ValueError: the folder lacks weights, or `dtype` is no name of `DTYPES`.
        """

        def build(dtype: torch.dtype) -> nn.Module:
            return complete(folder, unused, *network.from_pretrained(folder, dtype=dtype, output_loading_info=True))

        return self.once((network.__name__, str(folder.resolve())), device, dtype, build)

    def once(
        self, source: tuple[str, ...], device: Device, dtype: str, build: Callable[[torch.dtype], nn.Module]
    ) -> Backbone:
        """`build(dtype)` on `device`, frozen; loaded once for each source, dtype and device."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype = {dtype!r}: must be one of {sorted(DTYPES)}")
        key = (*source, dtype, str(torch.device(device)))
        if key not in self._loaded:
            # Only the device: a cast would also round the buffers that a model keeps in fp32 (rotary frequencies).
            self._loaded[key] = Backbone(build(DTYPES[dtype]).to(device).eval().requires_grad_(False), key)
        return self._loaded[key]


class NetworkReward(FrameReward):
    """A reward by the network of one model folder; a subclass states which network, and how it scores.

    Args:
        model: local folder, hub id or `package:module/folder`.
        frames: how many frames are scored, spread evenly; None scores all.
        frames_per_second: how many of each second are scored instead.

    Attributes:
        network: the transformers class.
        unused: prefixes of parameters that a folder may lack.
        settings: options that the version depends on.
    """

    network: Any
    unused: tuple[str, ...] = ()
    settings: tuple[object, ...] = ()
    differentiable = True

    def __init__(
        self, model: str, frames: int | None = None, frames_per_second: float | None = None,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        folder = resolve_folder(model)
        self.check(folder)
        self.frames = FrameSampling(frames, frames_per_second)
        self.use((backbones or Backbones()).load(self.network, folder, device, dtype, self.unused), folder)
        self.version = version([fingerprint(folder, (".",))], self.frames, dtype, *self.settings)

    def check(self, folder: Path) -> None:
        """
        Raises:
            ValueError: the folder holds a model of another kind, where loading it would not say so.
        """

    def use(self, backbone: Backbone, folder: Path) -> None:
        """
        Args:
            folder: of the preprocessor's configuration and the tokenizer.
        """
        self.backbone, self.preprocessing = backbone, self.preprocessing_of(backbone, folder)

    def preprocessing_of(self, backbone: Backbone, folder: Path) -> Preprocessing:
        return Preprocessing.of_folder(folder)


def version(fingerprints: Sequence[str], frames: FrameSampling, dtype: str, *settings: object) -> str:
    """A score's identity: the files that were read, the sampling, the settings, and the dtype where it is not fp32."""
    rest = [sha256("\0".join(map(str, settings)).encode()).hexdigest()[:16]] if settings else []
    rest += [] if dtype == "float32" else [dtype]
    return "-".join([*fingerprints, str(frames), *rest])
