"""Which weights does a checkpoint hold? Its parameters, fp32 and whole, each read from ZeRO's parts when asked for.

ZeRO 1 and 2 lay the parameters of a group one after the other and cut that vector into one piece a rank. ZeRO 3 cuts
every parameter: rank r's vector has the r-th part of each, ceil(numel / ranks) values, padded. Reading a parameter
takes its own bytes from the files: memory holds it and at most one part more. No process group; no pickle is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from bpgo_video.distributed.zero_files import (
    CheckpointError,
    Stored,
    complete_optimiser_files,
    model_file,
    read_file,
    read_without_tensors,
)

FLAT = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
Shapes = Mapping[str, torch.Size]


class Vector:
    """Stored tensors one after the other."""

    def __init__(self, parts: Sequence[Stored]):
        self.parts = parts
        self.starts = [0, *accumulate(part.numel for part in parts)]

    @property
    def numel(self) -> int:
        return self.starts[-1]

    def read_into(self, target: Tensor, start: int) -> None:
        """Fill `target` [n] with the values from `start` on, which may lie in several parts."""
        stop = start + len(target)
        for part, first, end in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            low, high = max(start, first), min(stop, end)
            if low < high:
                part.read_into(target[low - start : high - start], low - first)


@dataclass(frozen=True)
class Place:
    """Where a parameter of `shape` lies: `length` values from `start` on in each vector, joined and cut to size."""

    shape: torch.Size
    vectors: Sequence[Vector]
    start: int
    length: int

    def read(self) -> Tensor:
        whole = torch.empty(self.shape.numel(), dtype=self.vectors[0].parts[0].dtype)
        for vector, target in zip(
            self.vectors, whole.split(self.length or 1), strict=False
        ):  # small ones fill few ranks
            vector.read_into(target, self.start)
        return whole.view(self.shape)


def in_joined_groups(
    shapes: Sequence[Shapes], by_rank: Sequence[Sequence[Stored]], paddings: Sequence[Sequence[int]] | None
) -> dict[str, Place]:
    """ZeRO 1 and 2.

    Args:
        shapes: of the parameters of each group, in their order.
        by_rank: every rank's piece of each group.
        paddings: values between the parameters of each group, where DeepSpeed aligns them.

    Raises:
        ValueError: the pieces are not as long as the parameters.
    """
    places = {}
    for group, named in enumerate(shapes):
        vector = Vector([parts[group] for parts in by_rank])
        gaps = [0] * len(named) if paddings is None else paddings[group]
        start = 0
        for (name, shape), gap in zip(named.items(), gaps, strict=True):
            places[name] = Place(shape, [vector], start, shape.numel())
            start += shape.numel() + gap
        unit = 2 * len(by_rank)  # DeepSpeed pads the last rank's piece to a multiple of it, or takes the padding off
        _check_length(-(-start // unit) * unit, -(-vector.numel // unit) * unit)
    return places


def in_cut_parameters(
    shapes: Sequence[Shapes], by_rank: Sequence[Sequence[Stored]], paddings: Sequence[Sequence[int]] | None
) -> dict[str, Place]:
    """ZeRO 3; see `in_joined_groups`. Its padding follows from the shapes."""
    vectors = [Vector(parts) for parts in by_rank]
    places, start = {}, 0
    for name, shape in (item for named in shapes for item in named.items()):
        length = -(-shape.numel() // len(vectors))
        places[name] = Place(shape, vectors, start, length)
        start += length
    for vector in vectors:
        _check_length(start, vector.numel)
    return places


def _check_length(wanted: int, found: int) -> None:
    if wanted != found:
        raise ValueError(f"the parameters take {wanted} values and the files hold {found}")


LAYOUTS = {1: in_joined_groups, 2: in_joined_groups, 3: in_cut_parameters}


class ZeroParameters(Mapping[str, Tensor]):
    """The trained parameters in a checkpoint that `Engine.save` wrote under ZeRO 1, 2 or 3 on any number of ranks.

    Bit-equal to DeepSpeed's `get_fp32_state_dict_from_zero_checkpoint(exclude_frozen_parameters=True)`, buffers
    included; every look-up reads the tensor again.

    Raises:
        CheckpointError: a file is damaged, missing or names code, or the parts are not as long as the parameters.
    """

    def __init__(self, folder: Path):
        model = read_file(model_file(folder))
        files = complete_optimiser_files(folder)
        states = [read_without_tensors(path)["optimizer_state_dict"] for path in files]
        stage = int(states[0]["zero_stage"])
        by_rank = [
            [Stored.of(path, tensor) for tensor in state[FLAT[stage]]]
            for path, state in zip(files, states, strict=True)
        ]
        paddings = states[0].get("param_alignment_paddings")
        try:
            self._places = LAYOUTS[stage](model["param_shapes"], by_rank, paddings)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}; is the copy complete?") from None
        self._buffers = {name: model["module"][name] for name in model["buffer_names"] if name in model["module"]}
        self._aliases = {alias: name for alias, name in model["shared_params"].items() if name in self._places}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._buffers:
            buffer = self._buffers[name]
            return buffer.float() if buffer.is_floating_point() else buffer.clone()
        return self._places[self._aliases.get(name, name)].read()

    def __iter__(self) -> Iterator[str]:
        return iter({**self._buffers, **self._places, **self._aliases})

    def __len__(self) -> int:
        return len(set(self._buffers) | set(self._places) | set(self._aliases))
