"""How does a whole transformer leave as one file? By its authors' own names, written a tensor at a time.

The file is safetensors, whose writer would hold all tensors at once: a header that says where each lies, then the bytes
(github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bpgo_video.distributed.zero_files import CheckpointError

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name


def shapes_of(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Of tensors, by which safetensors file holds each; their values stay unread."""
    shapes = {}
    for name, path in files.items():
        with safe_open(path, framework="pt") as file:
            shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def write_single_file(path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """One safetensors file; in memory are the tensor that is written and the one before.

    Args:
        layout: of every tensor, in the order of the file.
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
            if (tuple(tensor.shape), tensor.dtype) != layout.get(name) or name not in offsets:
                raise CheckpointError(f"{path}: {name} is not to be written, or is not of {layout.get(name)}")
            stream.seek(start + offsets.pop(name))
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    if offsets:
        raise CheckpointError(f"{path}: {len(offsets)} tensors are missing, {list(offsets)[:3]} among them")


def verify_single_file(path: Path, expected: Iterable[tuple[str, Tensor]]) -> None:
    """Compare every tensor of a file.

    Raises:
        CheckpointError: names a tensor that differs, is missing, or should not be there.
    """
    with safe_open(path, framework="pt") as file:
        foreign = set(file.keys())
        for name, tensor in expected:
            if name not in foreign or not torch.equal(file.get_tensor(name), tensor):
                raise CheckpointError(f"{path}: {name} is not the checkpoint's")
            foreign.remove(name)
    if foreign:
        raise CheckpointError(f"{path} holds {sorted(foreign)[:3]}, which the checkpoint does not have")


def renamed(tensors: Iterable[tuple[str, Tensor]], name_of: Callable[[str], str]) -> Iterable[tuple[str, Tensor]]:
    return ((name_of(name), tensor) for name, tensor in tensors)
