"""How do trained weights leave? As a diffusers pipeline folder that any inference tool loads as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bpgo_video.data.atomic import new_folder
from bpgo_video.engine import Engine
from bpgo_video.model_card import CardFacts, write_card
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.policies.lora import merged_parameters

WEIGHTS_NAME = "diffusion_pytorch_model"
SHARD_BYTES = 5 * 10**9


def export_pipeline(engine: Engine, policy: Policy, name: str, output: Path, mesh: Mesh, card: CardFacts) -> Path:
    """The policy's pipeline with its transformer `name` as trained, adapters merged; written aside, then renamed.

    All ranks call it: parameters are gathered one at a time, and only rank 0 keeps and writes them.
    """
    tensors = ((key, value.cpu()) for key, value in merged_parameters(engine) if mesh.is_main)
    if mesh.is_main:
        write_pipeline(policy.folder, name, tensors, output, card)
    else:
        for _ in tensors:  # take part in every gather
            pass
    mesh.barrier()
    return output


def write_pipeline(
    base: Path,
    name: str,
    tensors: Iterable[tuple[str, Tensor]],
    output: Path,
    card: CardFacts,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A copy of the pipeline folder `base` in which component `name` has these weights; takes the place of `output`."""
    partial = output.with_name(f"partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base, partial, ignore=shutil.ignore_patterns(f"{WEIGHTS_NAME}*", ".cache", ".git*"))
    for component in base.iterdir():  # other components keep their weights; only ours change
        if component.is_dir() and component.name != name:
            for weights in component.glob(f"{WEIGHTS_NAME}*"):
                shutil.copy2(weights, partial / component.name)
    write_weights(tensors, partial / name, shard_bytes)
    write_card(card, partial)
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)


def write_transformer(
    base: Path, tensors: Iterable[tuple[str, Tensor]], output: Path, card: CardFacts, shard_bytes: int = SHARD_BYTES
) -> None:
    """A transformer's folder alone: the configuration of `base` with these weights."""
    with new_folder(output) as folder:
        shutil.copy2(base / "config.json", folder)
        write_weights(tensors, folder, shard_bytes)
        write_card(card, folder)


def write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """safetensors in diffusers' naming: one file, or numbered shards with an index; holds one shard in memory."""
    written: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        save_file(shard, folder / f"part-{len(written)}.safetensors", metadata={"format": "pt"})
        written.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    names = (
        [f"{WEIGHTS_NAME}.safetensors"]
        if len(written) == 1
        else [f"{WEIGHTS_NAME}-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
    )
    for number, name in enumerate(names):
        (folder / f"part-{number}.safetensors").rename(folder / name)
    if len(names) > 1:
        weight_map = {key: name for name, keys in zip(names, written, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    yield shard
