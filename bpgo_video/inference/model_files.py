"""Model files: diffusers folders, LoRA files, and whole transformers as one file; written a few tensors at a time.

diffusers   a pipeline folder, weights in safetensors shards
LoRA        a safetensors file per transformer, in one of two layouts that both compute W + alpha/rank B A:
            diffusers: transformer.LAYER.lora_A.weight, .lora_B.weight; rank, alpha and layers in the metadata
            ComfyUI: diffusion_model.LAYER.lora_down.weight, .lora_up.weight, .alpha; the authors' layer names
one file    a safetensors file with the authors' tensor names, for ComfyUI
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import HunyuanVideoLoraLoaderMixin
from more_itertools import constrained_batches, consume
from safetensors.torch import load_file
from torch import Tensor, nn

from bpgo_video.config.policy import LoraConfig
from bpgo_video.distributed.engine import Engine
from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.errors import some_of
from bpgo_video.files import save_tensors
from bpgo_video.inference.hub import CardFacts, write_card
from bpgo_video.policies import Policy, original_names
from bpgo_video.policies.lora import ADAPTER, check_adapter, merged_parameters, peft_config
from bpgo_video.weights import WeightsError, check_dtype, check_finite, headers

WEIGHTS_NAME = "diffusion_pytorch_model"
SHARD_BYTES = 5 * 10**9
OF_THIS_MODEL = "give adapters of this model, or download them again"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # in a safetensors header

Tensors = Iterable[tuple[str, Tensor]]
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name


def export_pipeline(
    engine: Engine, policy: Policy, names: Sequence[str], output: Path, mesh: Mesh, card: CardFacts
) -> Path:
    """Write the policy's pipeline with its trained transformers `names`, adapters merged; replaces `output` at the end.

    Every rank calls it: parameters are gathered one at a time, and rank 0 writes them.
    """
    if mesh.is_main:
        partial = output.with_name(f"partial-{output.name}")
        shutil.rmtree(partial, ignore_errors=True)
        trained = {name: ((key, value.cpu()) for key, value in merged_parameters(engine, name)) for name in names}
        write_pipeline(policy.folder, trained, partial)
        write_card(card, partial)
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    else:
        for name in names:
            consume(merged_parameters(engine, name))  # takes part in every gather
    mesh.barrier()
    return output


def write_pipeline(base: Path, trained: Mapping[str, Tensors], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Copy the pipeline folder `base` to `folder`, with these weights in the `trained` components."""

    def skipped(directory: str, names: list[str]) -> set[str]:
        of_trained = Path(directory).parent == base and Path(directory).name in trained
        weights = (f"{WEIGHTS_NAME}*",) if of_trained else ()
        return shutil.ignore_patterns(".cache", ".git*", *weights)(directory, names)

    shutil.copytree(base, folder, ignore=skipped, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for directory in (folder, *folder.rglob("*/")):
        directory.chmod(directory.stat().st_mode | 0o700)  # a shared store may be read-only
    for name, tensors in trained.items():
        write_weights(tensors, folder / name, shard_bytes)


def write_weights(tensors: Tensors, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write weights under diffusers' names: one file, or numbered shards with an index. Memory holds one shard."""
    copies = ((name, tensor.clone(memory_format=torch.contiguous_format)) for name, tensor in tensors)
    shards = constrained_batches(copies, shard_bytes, get_len=lambda item: item[1].nbytes, strict=False)
    written: list[list[str]] = []
    total = 0
    for shard in map(dict, shards):
        save_tensors(shard, folder / f"part-{len(written)}.safetensors", metadata={"format": "pt"})
        written.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(written):
        suffix = f"-{number + 1:05d}-of-{len(written):05d}" if len(written) > 1 else ""
        file = f"{WEIGHTS_NAME}{suffix}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(keys, file)
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")


def lora_file(name: str) -> str:
    """`transformer`: the file that load_lora_weights looks for; `transformer_2`: pytorch_lora_weights_2.safetensors."""
    return f"pytorch_lora_weights{name.removeprefix('transformer')}.safetensors"


def load_lora(pipeline: Any, file: Path, name: str) -> None:
    """Load adapters of either layout into the transformer `name` of a diffusers pipeline.

    HunyuanVideo 1.5's pipeline loads no adapters; its transformer loads diffusers' layout.

    Raises:
        WeightsError, ValueError: see `check_lora`, or diffusers does not know the layout.
    """
    check_lora(pipeline, file, getattr(pipeline, name))
    if not hasattr(pipeline, "load_lora_weights"):
        getattr(pipeline, name).load_lora_adapter(file.parent, weight_name=file.name, adapter_name=ADAPTER)
        return
    into = {"load_into_transformer_2": True} if name == "transformer_2" else {}
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER, **into)


def check_lora(pipeline: Any, file: Path, transformer: nn.Module) -> None:
    """Check a file of adapters against the transformer's layers: diffusers skips what it cannot use.

    Raises:
        WeightsError: the file is damaged, or an adapter lacks a half, has no such layer, another shape or dtype, or a
            value that is not finite.
    """
    for key, (dtype, _) in headers([file]).items():
        if not key.endswith("alpha"):
            check_dtype(file, key, dtype, OF_THIS_MODEL)
    read = getattr(pipeline, "lora_state_dict", None)
    try:
        stored = read(str(file.parent), weight_name=file.name) if read else load_file(file)
    except KeyError as error:
        raise WeightsError(f"{file} lacks a half of an adapter, {error}; {OF_THIS_MODEL}") from error
    check_finite(file, stored.items(), OF_THIS_MODEL)
    tensors, layers = {key.removeprefix("transformer."): one for key, one in stored.items()}, transformer.state_dict()
    for layer in sorted({key.partition(".lora_")[0] for key in tensors}):
        halves = [tensors.get(f"{layer}.lora_{half}.weight") for half in "AB"]
        if f"{layer}.weight" not in layers:
            raise WeightsError(f"{file} has an adapter of {layer}, but the model has no such layer; {OF_THIS_MODEL}")
        if halves[0] is None or halves[1] is None:
            raise WeightsError(f"{file}: the adapter of {layer} lacks its A or its B; {OF_THIS_MODEL}")
        try:
            check_adapter(layer, layers[f"{layer}.weight"], halves[0], halves[1])
        except ValueError as error:
            raise WeightsError(f"{file}: {error}; {OF_THIS_MODEL}") from None


def write_diffusers_lora(adapters: Mapping[str, Tensor], lora: LoraConfig, pipeline_class: str, file: Path) -> None:
    """Write the file that `pipeline.load_lora_weights` or `transformer.load_lora_adapter` reads.

    Args:
        adapters: LAYER.lora_A.default.weight [rank, in] and LAYER.lora_B.default.weight [out, rank].
        pipeline_class: name of the pipeline's class in diffusers, such as WanPipeline.
    """
    writer = getattr(diffusers, pipeline_class)
    if not hasattr(writer, "save_lora_weights"):
        writer = HunyuanVideoLoraLoaderMixin  # the layout is the same
    writer.save_lora_weights(
        file.parent,
        {name.replace(f".{ADAPTER}.", "."): tensor.contiguous() for name, tensor in adapters.items()},
        weight_name=file.name,
        transformer_lora_adapter_metadata=peft_config(lora).to_dict(),
    )


def write_comfyui_lora(adapters: Mapping[str, Tensor], lora: LoraConfig, pipeline_class: str, file: Path) -> None:
    """Write the file for ComfyUI's LoRA loader; arguments as in `write_diffusers_lora`.

    Raises:
        ConfigError: a family whose authors' names are not known.
    """
    name_of, tensors = original_names(pipeline_class), {}
    for name, down in adapters.items():
        layer, half, _ = name.partition(f".lora_A.{ADAPTER}.weight")
        if not half:
            continue
        up, prefix = adapters[f"{layer}.lora_B.{ADAPTER}.weight"], f"diffusion_model.{name_of(layer)}"
        if name_of(layer).startswith("blocks."):
            tensors[f"{prefix}.alpha"] = torch.tensor(float(lora.alpha), dtype=torch.float32)
        else:  # diffusers reads alpha in blocks only; without alpha, both programs scale by 1
            up = up * (lora.alpha / lora.rank)
        tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
    save_tensors(tensors, file, metadata={"format": "pt"})


def shapes_of(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors, given the safetensors file of each; reads no values."""
    stored = headers(set(files.values()))
    return {name: stored[name][1] for name in files}


def write_single_file(path: Path, layout: Layout, tensors: Tensors) -> None:
    """Write one safetensors file with one tensor in memory; the library's writer would hold all.

    The format is a header with the place of each tensor, then the bytes (github.com/huggingface/safetensors, "Format").

    Args:
        layout: shape and dtype of every tensor, in the order of the file.
        tensors: each once, in any order.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype, or is not in `layout`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, size = {}, 0
    for name, (shape, dtype) in layout.items():
        offsets[name], stop = size, size + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [size, stop]}
        size = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        start = stream.tell()
        for name, tensor in tensors:
            if name not in offsets or (tuple(tensor.shape), tensor.dtype) != layout[name]:
                raise CheckpointError(f"{path}: {name} is not in the file's layout, or is not of {layout.get(name)}")
            stream.seek(start + offsets.pop(name))
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    if offsets:
        raise CheckpointError(f"{path} lacks tensors: {some_of(offsets)}")
