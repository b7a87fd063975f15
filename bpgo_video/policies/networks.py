"""Networks of a diffusers pipeline folder: their classes, configs and loading; how they run, and where they rest."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Iterable
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bpgo_video.config.bpgo import ConfigError, PolicyConfig
from bpgo_video.distributed.ds_config import finish_build, model_buffers, tensor_files
from bpgo_video.weights import LIBRARIES, load_network, read_json

Build = Callable[[Any, Path, torch.dtype], nn.Module]  # (model class, its folder, dtype) -> the loaded module
Load = Callable[[Any, Path, torch.dtype, torch.device | str], nn.Module]  # the same, on a device
COMPONENTS = ("transformer", "text_encoder", "image_encoder", "vae")
COMPONENT_OF = {"connectors": "text_encoder", "audio_vae": "vae", "vocoder": "vae"}  # parts with names of their own


def from_pretrained(model_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The whole model on this process, for inference and for ZeRO 1 and 2.

    Raises:
        WeightsError: the folder does not hold exactly the model's weights; see `load_network`.
        PrecisionError: a tensor has a dtype other than the one that `ds_config.py` sets.
    """
    model = load_network(model_class, folder, dtype)
    finish_build(model, model_buffers(model_class, folder, tensor_files(folder, model_class)), dtype)
    return model


def load_frozen(model_class: Any, folder: Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """A network that is never trained, in evaluation mode. Raises WeightsError, see `load_network`."""
    return load_network(model_class, folder, dtype).to(device).eval().requires_grad_(False)


def read_index(folder: Path) -> dict[str, Any]:
    """The folder's model_index.json: parts and settings by name."""
    return read_json(folder / "model_index.json")


def parts_of(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class name of each part of a pipeline, by its model_index.json; parts that are null are left out.

    Raises:
        ConfigError: a part is of another library than diffusers and transformers, whose code would run.
    """
    parts: dict[str, tuple[str, str]] = {}
    for part, value in read_index(folder).items():
        match value:
            case [str(library), str(name)] if library in LIBRARIES:
                parts[part] = (library, name)
            case [str(library), str(name)] if library.isidentifier() and find_spec(f"diffusers.pipelines.{library}"):
                parts[part] = (f"diffusers.pipelines.{library}", name)  # LTX-2's connectors are ["ltx2", ...]
            case [str(), _]:
                raise ConfigError(
                    f"{folder / 'model_index.json'} names {value} as its {part}, but parts must be classes of "
                    f"{' or '.join(LIBRARIES)}; correct it, or name another folder"
                )
    return parts


def component_of(name: str) -> str | None:
    """The entry of COMPONENTS that a part belongs to: text_encoder for text_encoder_2, None for a tokenizer."""
    return COMPONENT_OF.get(name) or next((one for one in COMPONENTS if name.startswith(one)), None)


def class_of(folder: Path, part: str) -> Any:
    """The class of a part of a pipeline, by its model_index.json.

    Raises:
        ConfigError: see `parts_of`, there is no such part, or the installed library has no such class.
    """
    file, parts = folder / "model_index.json", parts_of(folder)
    if part not in parts:
        raise ConfigError(f"{file} names no {part}; download the folder again, or name another one")
    library, name = parts[part]
    found, release = getattr(importlib.import_module(library), name, None), version(library.partition(".")[0])
    if not isinstance(found, type):
        raise ConfigError(
            f"{file} names {name} as its {part}, which {library} {release} does not have; install a version "
            "that has it, or name another folder"
        )
    return found


def networks_of(folder: Path) -> dict[str, Any]:
    """The classes of a pipeline's networks by their names in it."""
    return {part: class_of(folder, part) for part in parts_of(folder) if component_of(part)}


def transformer_names(folder: Path) -> tuple[str, ...]:
    """The transformers of a pipeline folder, by its model_index.json: one, or the two of Wan 2.2.

    Raises:
        ConfigError: see `parts_of`, or there is none.
    """
    names = tuple(part for part in sorted(parts_of(folder)) if component_of(part) == "transformer")
    if not names:
        raise ConfigError(f"{folder / 'model_index.json'} names no transformer; name a folder of a video model")
    return names


def trained_names(folder: Path, names: Collection[str] = ()) -> tuple[str, ...]:
    """The transformers to train: those of `policy.trained`, or all if it is empty.

    Raises:
        ConfigError: the folder has no transformer of that name.
    """
    present = transformer_names(folder)
    if unknown := sorted(set(names) - set(present)):
        raise ConfigError(f"policy.trained names {unknown}, but {folder} has {list(present)}; an empty list trains all")
    return tuple(name for name in present if name in names) or present


class Transformers(nn.ModuleDict):
    """The transformers of a pipeline by their names in it, so that one engine shards, steps and saves them together.

    A forward names the transformer that computes. Under ZeRO-3 the others stay sharded, so all ranks must call the same
    transformer at the same time.
    """

    def forward(self, name: str, **inputs: Any) -> Any:
        return self[name](**inputs)


def blocks_of(module: nn.Module, names: Iterable[str]) -> tuple[type[nn.Module], ...]:
    """The classes with these names among a module's submodules.

    Raises:
        ConfigError: the module has none of them.
    """
    classes = {type(part).__name__: type(part) for part in module.modules()}
    blocks = tuple(classes[name] for name in names if name in classes)
    if not blocks:
        raise ConfigError(
            f"{type(module).__name__} has no block of {list(names)}; correct the layers in its config.json, or the "
            "block_names of the policy's class"
        )
    return blocks


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of a transformer's lists of blocks: ZeRO-3 fetches, and checkpointing recomputes, each as one."""
    return [block for part in module.children() if isinstance(part, nn.ModuleList) for block in part]


def shorten(transformer: nn.Module, blocks: int | None) -> None:
    """Leave the first `blocks` of each list of blocks; None leaves all."""
    for name, part in transformer.named_children():
        if isinstance(part, nn.ModuleList):
            setattr(transformer, name, part[:blocks])


def checkpoint_blocks(transformer: Any, share: float = 1.0) -> None:
    """Compute blocks again in the backward instead of keeping their activations; gradients are the same.

    Args:
        share: of the blocks, evenly spread over the depth; the others keep their activations. In (0, 1].
    """
    blocks = repeated_blocks(transformer)
    kept = {block for i, block in enumerate(blocks) if round_down((i + 1) * share) == round_down(i * share)}

    def call(block: nn.Module, *inputs: Any) -> Any:
        return block(*inputs) if block in kept else checkpoint(block, *inputs, use_reentrant=False)

    transformer.enable_gradient_checkpointing(call)


def round_down(position: float) -> int:
    """As `floor`, but for the rounding of a product: 3 for .3 * 10."""
    return math.floor(position + 1e-9)


def compile_blocks(transformer: nn.Module, block_classes: tuple[type, ...]) -> None:
    """Compile each repeated block with its adapters and checkpointing; blocks of one class share their code.

    `emulate_precision_casts` keeps the model's own roundings to bf16 between operations. Rollout and replay are
    compiled as two programs, which agree bit by bit only with these roundings.
    """
    for part in transformer.modules():
        if isinstance(part, block_classes):
            part.compile(options={"emulate_precision_casts": True})


def save_memory(policy: Any, settings: PolicyConfig, device: torch.device) -> None:
    """Apply `vae_tiling`, `vae_slicing` and `frozen_rest_on` to a policy that has just been loaded.

    Args:
        device: where VAE and image encoder compute.

    Raises:
        ConfigError: the VAE does not support it.
    """
    if policy.pipeline.vae is not None:
        split_vae_work(policy.pipeline.vae, tiling=settings.vae_tiling, slicing=settings.vae_slicing)
    if settings.frozen_rest_on == "cpu":
        _rest_on_cpu(policy, device)


def split_vae_work(vae: Any, *, tiling: bool, slicing: bool) -> None:
    """Let a VAE compute tile by tile, or one video at a time.

    Raises:
        ConfigError: its class does not support it.
    """
    for enabled, name in ((tiling, "tiling"), (slicing, "slicing")):
        if not enabled:
            continue
        try:
            getattr(vae, f"enable_{name}")()
        except (AttributeError, NotImplementedError) as error:
            raise ConfigError(
                f"policy.vae_{name} is true, but {type(vae).__name__} does not support it; set it to false, or take a "
                "smaller micro-batch"
            ) from error


def _rest_on_cpu(policy: Any, device: torch.device) -> None:
    """Keep VAEs and image encoder on the CPU except while a method that needs them runs."""
    networks = [
        part
        for name, part in policy.pipeline.components.items()
        if isinstance(part, nn.Module) and component_of(name) in ("vae", "image_encoder")
    ]
    for network in networks:
        network.to("cpu")
    for name in ("decode", "decode_audio", "image_conditioning", "control_conditioning"):
        setattr(policy, name, _on_device(getattr(policy, name), networks, device))


def _on_device(method: Callable[..., Any], networks: list[nn.Module], device: torch.device) -> Callable[..., Any]:
    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        for network in networks:
            network.to(device)
        try:
            return method(*args, **kwargs)
        finally:
            for network in networks:
                network.to("cpu")

    return run
