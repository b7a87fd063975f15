"""Models by name: a pipeline folder, or the trained weights of a run, read from a checkpoint one tensor at a time.

    RUN/checkpoints/step-000050, and the pipeline folder that RUN/config.yaml names -> every tensor of a transformer

A checkpoint prefixes parameters with the transformer's name: `transformer.blocks.0.attn1.to_q.weight`. The weights are
the optimizer's fp32 ones, rounded to the requested dtype before adapters are merged, as in training. Parameters that
diffusers keeps in fp32 are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpgo_video.config.generation import GenerationError, GenerationSettings
from bpgo_video.config.policy import options_of
from bpgo_video.config.reading import read_recipe
from bpgo_video.config.sft import Recipe
from bpgo_video.distributed import checkpoint, resume
from bpgo_video.distributed.ds_config import model_buffers, parameter_dtype, read_tensor, tensor_files
from bpgo_video.distributed.ema import AverageParameters
from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.distributed.zero_files import (
    ZeroParameters,
    model_file,
    optimizer_files,
    read_file,
    refuse_foreign_pickles,
)
from bpgo_video.errors import some_of
from bpgo_video.files import resolve_folder
from bpgo_video.policies import Policy, family, load_policy
from bpgo_video.policies.lora import merged_tensors
from bpgo_video.policies.networks import networks_of, trained_names
from bpgo_video.weights import check_finite, check_stored, headers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS: dict[str, Callable[[Path], Mapping[str, Tensor]]] = {"raw": ZeroParameters, "ema": AverageParameters}
FROM_RECIPE = {  # setting -> section of a run's recipe with its default
    **dict.fromkeys(("num_frames", "height", "width", "fps"), "video"),
    **dict.fromkeys(("vae_tiling", "vae_slicing", "attention_backend"), "policy"),
}


@dataclass(frozen=True)
class Checkpoint:
    """A training checkpoint and the model that its run started from.

    Attributes:
        folder: `RUN/checkpoints/step-XXXXXX`.
        base: the diffusers pipeline folder that the run started from.
        config: the run's recipe.
        step: number of finished training steps.
        code: versions of the program that trained, in order.
    """

    folder: Path
    base: Path
    config: Recipe
    step: int
    code: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the trained transformers in the pipeline."""
        return trained_names(self.base, self.config.policy.trained)

    @property
    def pipeline_class(self) -> str:
        """Name of the pipeline's class in diffusers."""
        return family(self.base, self.config.policy.family).pipeline_name

    def files(self, name: str) -> dict[str, Path]:
        """The file of the base folder with each tensor of the transformer `name`.

        Raises:
            WeightsError: the files do not hold exactly its weights.
        """
        kind, folder = networks_of(self.base)[name], self.base / name
        return check_stored(kind, folder, tensor_files(folder, kind))

    def dtype_of(self, name: str, key: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of tensor `key` in the transformer `name` when that computes in `dtype`."""
        return parameter_dtype(networks_of(self.base)[name], key, dtype)


def holds_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a checkpoint, or like a run folder with checkpoints."""
    return (path / checkpoint.FOLDER).is_dir() or any(path.glob("*_model_states.pt"))


def find_checkpoint(path: Path, rank: int = 0, world_size: int = 1) -> Checkpoint:
    """The checkpoint at `path`, or the newest one of the run at `path`.

    Args:
        rank, world_size: of several processes that read it, each of which checks its share of the files.

    Raises:
        CheckpointError: no checkpoint, not a ZeRO checkpoint, incomplete, or it names code to run.
        ConfigError, FileNotFoundError: config.yaml, or the model folder that it names, is missing or damaged.
    """
    folder = path.resolve()
    if not holds_checkpoint(folder):
        raise CheckpointError(f"{path} is neither a checkpoint (RUN/checkpoints/step-XXXXXX) nor a run's folder")
    if (folder / checkpoint.FOLDER).is_dir():
        newest = checkpoint.newest(folder)
        if newest is None:
            raise CheckpointError(
                f"{path / checkpoint.FOLDER} holds no complete checkpoint yet; wait for the first one"
            )
        folder = folder / checkpoint.FOLDER / newest
    config_file = folder.parents[1] / "config.yaml"
    if not config_file.is_file():
        raise CheckpointError(f"{config_file} is missing, which names the run's model; copy it there from the run")
    resume.check(folder, rank, world_size)
    refuse_foreign_pickles(folder)
    optimizer_files(folder)
    state = read_file(model_file(folder))
    if "progress" not in state:
        raise CheckpointError(f"{folder} has no training progress in it: bpgo-video did not write it")
    config = read_recipe(config_file)
    base = resolve_folder(config.policy.folder)
    return Checkpoint(folder, base, config, state["progress"]["step"], tuple(state.get("code", ())))


@dataclass(frozen=True)
class Model:
    """A model for generation.

    Attributes:
        policy: of the pipeline folder, no networks loaded.
        checkpoint: its weights replace the pipeline's; None for a pipeline folder alone.
    """

    policy: Policy
    checkpoint: Checkpoint | None

    def complete(self, settings: GenerationSettings) -> GenerationSettings:
        """The settings, with values of a run's recipe in place of None."""
        if self.checkpoint is None:
            return settings
        recipe = self.checkpoint.config
        missing = {name: section for name, section in FROM_RECIPE.items() if getattr(settings, name) is None}
        return replace(settings, **{name: getattr(getattr(recipe, key), name) for name, key in missing.items()})


def find_model(settings: GenerationSettings, rank: int = 0, world_size: int = 1) -> Model:
    """The pipeline folder or the training checkpoint that `settings.policy` names; see `named_model`.

    Raises:
        GenerationError: averaged weights of a model that is no checkpoint.
    """
    model = named_model(settings.policy, settings.family, options_of(settings), rank, world_size)
    if model.checkpoint is None and settings.weights != "raw":
        raise GenerationError(
            f"weights is {settings.weights!r}, but {settings.policy} is no training checkpoint or run; remove --weights"
        )
    return model


def named_model(
    policy: str,
    family: str | None = None,
    options: Mapping[str, float] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Model:
    """A pipeline folder, a training checkpoint, or the newest one of a run.

    Args:
        family: see `policies.family`; None takes the run's, or what the folder says.
        options: the family's own settings; they replace those of the run.
        rank, world_size: see `find_checkpoint`.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError: there is no such model, or it cannot be used.
    """
    path = Path(policy).expanduser()
    checkpoint = find_checkpoint(path, rank, world_size) if path.is_dir() and holds_checkpoint(path) else None
    folder, recipe = (str(checkpoint.base), checkpoint.config.policy) if checkpoint else (policy, None)
    values = (recipe.options if recipe else {}) | dict(options or {})
    name = family or (recipe.family if recipe else None)
    return Model(load_policy(folder, max_sequence_length=1, components=(), name=name, options=values), checkpoint)


def trained_tensor(source: Checkpoint, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A parameter of the checkpoint by its name in `weights`. Raises WeightsError if it is not finite."""
    tensor = weights[name]
    check_finite(source.folder, [(name, tensor)], "name an earlier checkpoint")
    return tensor


def adapter_tensors(source: Checkpoint, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters of the transformer `name`, A and B of every layer, fp32.

    Raises:
        CheckpointError: the run trained all weights.
        WeightsError: an adapter is not finite.
    """
    if not source.config.policy.lora.rank:
        raise CheckpointError(
            f"{source.folder} holds no adapters: its run trained all weights (policy.lora.rank is 0); convert it to "
            "--format diffusers"
        )
    prefix = f"{name}."
    names = [name for name in weights if name.startswith(prefix) and ".lora_" in name]
    return {name.removeprefix(prefix): trained_tensor(source, weights, name) for name in names}


def trained_tensors(
    source: Checkpoint, name: str, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a trained transformer by its name in the base folder; adapters are merged.

    Args:
        name: one of `source.trained`.
        weights: the checkpoint's fp32 parameters, such as `WEIGHTS["raw"](source.folder)`.
        dtype: the dtype that the transformer computes in.

    Raises:
        CheckpointError: the checkpoint does not fit the base folder.
        WeightsError: the base folder does not hold exactly the transformer's weights, or one of these or of the trained
            ones is not finite.
    """
    files, folder, lora = source.files(name), source.base / name, source.config.policy.lora

    def finite(key: str) -> Tensor:
        tensor = read_tensor(files[key], key)
        check_finite(folder, [(key, tensor)])
        return tensor

    if lora.rank:
        base = ((key, finite(key).to(source.dtype_of(name, key, dtype))) for key in files)
        adapters = adapter_tensors(source, name, weights)
        try:
            yield from merged_tensors(base, adapters, lora)
        except ValueError as error:
            raise CheckpointError(f"{source.folder} does not fit {folder}: {error}") from None
        return
    missing = {key for key in files if f"{name}.{key}" not in weights}
    if missing:  # buffers are no parameters, and an average has none
        missing -= set(model_buffers(networks_of(source.base)[name], folder, files))
    if missing:
        raise CheckpointError(f"{source.folder} lacks tensors of {folder}: {some_of(missing)}; is it the run's model?")
    shapes = headers(set(files.values()))
    for key in files:
        trained = f"{name}.{key}"
        tensor = trained_tensor(source, weights, trained) if trained in weights else finite(key)
        if tuple(tensor.shape) != shapes[key][1]:
            raise CheckpointError(
                f"{source.folder} has {trained} as {[*tensor.shape]}, but {folder} as {[*shapes[key][1]]}; is it the "
                "run's model?"
            )
        yield key, tensor.to(source.dtype_of(name, key, dtype))


def load_trained(
    transformer: Any, source: Checkpoint, name: str, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Replace the weights of a transformer, loaded from `name` of the base folder, by `trained_tensors`."""
    parameters = transformer.state_dict()
    for key, tensor in trained_tensors(source, name, weights, dtype):
        parameters[key].copy_(tensor)
