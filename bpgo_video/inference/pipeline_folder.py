"""How do trained weights leave? As a diffusers pipeline folder that any inference tool loads as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from bpgo_video.atomic import new_folder, save_tensors
from bpgo_video.distributed.engine import Engine
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.inference.model_card import CardFacts, write_card
from bpgo_video.policies import Policy
from bpgo_video.policies.lora import merged_parameters

WEIGHTS_NAME = "diffusion_pytorch_model"
SHARD_BYTES = 5 * 10**9

Tensors = Iterable[tuple[str, Tensor]]


def export_pipeline(
    engine: Engine, policy: Policy, names: Sequence[str], output: Path, mesh: Mesh, card: CardFacts
) -> Path:
    """The policy's pipeline with its transformers `names` as trained, adapters merged; written aside, then renamed.

    All ranks call it: parameters are gathered one at a time, and only rank 0 keeps and writes them.
    """

    def tensors(name: str) -> Iterator[tuple[str, Tensor]]:
        return ((key, value.cpu()) for key, value in merged_parameters(engine, name) if mesh.is_main)

    if mesh.is_main:
        write_pipeline(policy.folder, {name: tensors(name) for name in names}, output, card)
    else:
        for _ in chain.from_iterable(map(tensors, names)):  # take part in every gather
            pass
    mesh.barrier()
    return output


def write_pipeline(
    base: Path, trained: Mapping[str, Tensors], output: Path, card: CardFacts, shard_bytes: int = SHARD_BYTES
) -> None:
    """A copy of the pipeline folder `base` in which the `trained` components have these weights; replaces `output`."""
    partial = output.with_name(f"partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    others = shutil.ignore_patterns(f"{WEIGHTS_NAME}*", ".cache", ".git*")
    shutil.copytree(base, partial, ignore=others, copy_function=shutil.copyfile)
    for folder in (partial, *partial.rglob("*/")):
        folder.chmod(folder.stat().st_mode | 0o700)  # those of a shared store may be read-only
    for component in base.iterdir():  # other components keep their weights; only ours change
        if component.is_dir() and component.name not in trained:
            for weights in component.glob(f"{WEIGHTS_NAME}*"):
                shutil.copyfile(weights, partial / component.name / weights.name)
    for name, tensors in trained.items():
        write_weights(tensors, partial / name, shard_bytes)
    write_card(card, partial)
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)


def write_transformers(
    base: Path, trained: Mapping[str, Tensors], output: Path, card: CardFacts, shard_bytes: int = SHARD_BYTES
) -> None:
    """The trained components of `base` alone: one as `output` itself, several in folders of it by their names."""
    with new_folder(output) as folder:
        for name, tensors in trained.items():
            part = folder / name if len(trained) > 1 else folder
            part.mkdir(exist_ok=True)
            shutil.copyfile(base / name / "config.json", part / "config.json")
            write_weights(tensors, part, shard_bytes)
        write_card(card, folder)


def write_weights(tensors: Tensors, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """safetensors in diffusers' naming: one file, or numbered shards with an index; holds one shard in memory."""
    written: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        save_tensors(shard, folder / f"part-{len(written)}.safetensors", metadata={"format": "pt"})
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
        (folder / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def _shards(tensors: Tensors, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    yield shard
