"""Which weights did a run train, and under which names does the model have them? Read from a checkpoint, one at a time.

    RUN/checkpoints/step-000050 and the pipeline folder that RUN/config.yaml names -> every tensor of a transformer

A checkpoint's parameters bear the transformer's name in front: `transformer.blocks.0.attn1.to_q.weight`.

Weights are the optimizer's fp32 ones, rounded to the requested dtype before adapters are merged, as training holds
them. Parameters that diffusers keeps in fp32 are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bpgo_video.config.reading import read_recipe
from bpgo_video.config.sft import Recipe
from bpgo_video.distributed import checkpoint
from bpgo_video.distributed.ema import AverageParameters
from bpgo_video.distributed.precision import model_buffers, parameter_dtype, read_tensor, tensor_files
from bpgo_video.distributed.zero_files import (
    CheckpointError,
    ZeroParameters,
    model_file,
    optimizer_files,
    read_file,
    refuse_foreign_pickles,
)
from bpgo_video.paths import resolve_folder
from bpgo_video.policies import family
from bpgo_video.policies.lora import merged_tensors
from bpgo_video.policies.networks import networks_of, trained_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS: dict[str, Callable[[Path], Mapping[str, Tensor]]] = {"raw": ZeroParameters, "ema": AverageParameters}


@dataclass(frozen=True)
class Source:
    """A checkpoint and the model that its run started from.

    Attributes:
        folder: the checkpoint, `RUN/checkpoints/step-XXXXXX`.
        base: the diffusers pipeline folder that the run started from.
        config: the run's own.
        step: finished training steps.
        code: the versions of the program that made them, in order.
    """

    folder: Path
    base: Path
    config: Recipe
    step: int
    code: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[str, ...]:
        """The transformers that the run trained, by their names in the pipeline."""
        return trained_names(self.base, self.config.policy.trained)

    def files(self, name: str) -> dict[str, Path]:
        """Which file of the base folder holds each tensor of a transformer."""
        return tensor_files(self.base / name, networks_of(self.base)[name])

    def dtype_of(self, name: str, key: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a tensor of the transformer `name` where the transformer computes in `dtype`."""
        return parameter_dtype(networks_of(self.base)[name], key, dtype)

    @property
    def pipeline_class(self) -> str:
        """diffusers' name of the pipeline's class."""
        return family(self.base, self.config.policy.family).pipeline_name


def holds_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a checkpoint, or like a run's folder that has checkpoints."""
    return (path / checkpoint.FOLDER).is_dir() or any(path.glob("*_model_states.pt"))


def find_source(path: Path) -> Source:
    """The checkpoint at `path`, or the newest one of the run at `path`, with what the run's config.yaml says of it.

    Raises:
        CheckpointError: there is none; or it is none of ZeRO, incomplete, or names code to run.
        ConfigError, FileNotFoundError: config.yaml, or the model folder that it names, is missing or damaged.
    """
    folder = path.resolve()
    if not holds_checkpoint(folder):
        raise CheckpointError(f"{path} is neither a checkpoint (RUN/checkpoints/step-XXXXXX) nor a run's folder")
    if (folder / checkpoint.FOLDER).is_dir():
        name = checkpoint.newest(folder)
        if name is None:
            raise CheckpointError(f"{path / checkpoint.FOLDER} holds no complete checkpoint yet")
        folder = folder / checkpoint.FOLDER / name
    config_file = folder.parents[1] / "config.yaml"
    if not config_file.is_file():
        raise CheckpointError(f"{config_file} is missing: it says which model the run started from; copy it there")
    refuse_foreign_pickles(folder)
    optimizer_files(folder)
    state = read_file(model_file(folder))
    if "progress" not in state:
        raise CheckpointError(f"{folder} was not written by a run of this program: it has no progress in it")
    config = read_recipe(config_file)
    base = resolve_folder(config.policy.folder)
    return Source(folder, base, config, state["progress"]["step"], tuple(state.get("code", ())))


def adapter_tensors(source: Source, name: str, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's adapters in a checkpoint, A and B of every layer by its name in the transformer, fp32.

    Raises:
        CheckpointError: the run trained all weights.
    """
    if not source.config.policy.lora.rank:
        raise CheckpointError(f"{source.folder} holds no adapters: its run trained all weights (policy.lora.rank 0)")
    prefix = f"{name}."
    own = (key for key in trained if key.startswith(prefix) and ".lora_" in key)
    return {key.removeprefix(prefix): trained[key] for key in own}


def trained_tensors(
    source: Source, name: str, trained: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a trained transformer, under the name that it has in the base folder; adapters merged.

    Args:
        name: of the transformer, one of `source.trained`.
        trained: the checkpoint's parameters, fp32: `WEIGHTS["raw"](source.folder)`.
        dtype: that the transformer computes in.

    Raises:
        CheckpointError: the checkpoint does not fit the base folder.
    """
    if source.config.policy.lora.rank:
        base = ((key, tensor.to(source.dtype_of(name, key, dtype))) for key, tensor in read_tensors(source.files(name)))
        try:
            yield from merged_tensors(base, adapter_tensors(source, name, trained), source.config.policy.lora)
        except ValueError as error:
            raise CheckpointError(f"{source.folder} does not fit {source.base / name}: {error}") from None
        return
    for key, file in base_files(source, name, trained).items():
        tensor = trained[f"{name}.{key}"] if f"{name}.{key}" in trained else read_tensor(file, key)
        yield key, tensor.to(source.dtype_of(name, key, dtype))


def base_files(source: Source, name: str, trained: Mapping[str, Tensor]) -> dict[str, Path]:
    """Which file of the base folder holds each tensor of a transformer whose parameters are all trained.

    Raises:
        CheckpointError: the checkpoint lacks one that is no buffer.
    """
    folder = source.base / name
    files = source.files(name)
    missing = {key for key in files if f"{name}.{key}" not in trained}
    if missing:  # buffers are no parameters, and an average has none
        missing -= set(model_buffers(networks_of(source.base)[name], folder, files))
    if missing:
        raise CheckpointError(
            f"{source.folder} lacks {len(missing)} tensors of {folder}, {sorted(missing)[:3]} among them"
        )
    return files


def put_into(transformer: Any, source: Source, name: str, trained: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Replace the weights of a whole transformer, `name` of the base folder, by what `trained_tensors` gives."""
    weights = transformer.state_dict()
    for key, tensor in trained_tensors(source, name, trained, dtype):
        weights[key].copy_(tensor)


def read_tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, by which file holds each; one in memory at a time."""
    for name, path in files.items():
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(name)
