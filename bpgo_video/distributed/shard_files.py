"""How do shards of parameters lie in files, so that any number of ranks can read what any other wrote?

    KIND-rank-00000.safetensors, one of each rank

A file holds the flat shards of its rank by parameter name; its header says where in the parameter each begins, and what
shape that has. So any rank can pick its elements out of all files, and whole parameters come together without ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bpgo_video.atomic import save_tensors
from bpgo_video.distributed.checkpoint import CheckpointError
from bpgo_video.distributed.master_weights import Shard


@dataclass(frozen=True)
class Run:
    """A run of elements of one parameter, in an open file."""

    start: int
    stop: int
    elements: Any


class SavedShards:
    """The shards of one kind in a folder, their files open from `with` to its end.

    Attributes:
        notes: what was written beside them.
        shapes: of the whole parameters.

    Raises:
        FileNotFoundError: there are none.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.notes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._runs: dict[str, list[Run]] = {}
        self._files = ExitStack()

    def __enter__(self) -> SavedShards:
        paths = sorted(self.folder.glob(f"{self.kind}-rank-*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"{self.folder} holds no {self.kind}-rank-*.safetensors")
        for path in paths:
            file = self._files.enter_context(safe_open(path, framework="pt"))
            self.notes = file.metadata()
            header = json.loads(self.notes.pop("shards"))
            for name in file.keys():  # noqa: SIM118, it is no dict
                elements = file.get_slice(name)
                start = header[name]["start"]
                self.shapes[name] = tuple(header[name]["shape"])
                self._runs.setdefault(name, []).append(Run(start, start + elements.get_shape()[0], elements))
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def elements(self, shard: Shard) -> Tensor:
        """What the files have in place of a shard's values, whichever ranks wrote it; [elements], fp32, on the CPU.

        Raises:
            CheckpointError: the parameter has another shape, or a file is missing.
        """
        if self.shapes.get(shard.name) != shard.shape:
            raise CheckpointError(
                f"{self.kind} in {self.folder} has {shard.name} as {self.shapes.get(shard.name)}, the model as "
                f"{shard.shape}; is it a checkpoint of this model?"
            )
        return self._read(shard.name, shard.start, shard.start + shard.values.numel())

    def whole(self, name: str) -> Tensor:
        """A parameter of all ranks' shards, fp32, on the CPU."""
        shape = self.shapes[name]
        return self._read(name, 0, prod(shape)).reshape(shape)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        found, missing = torch.empty(stop - start), stop - start
        for run in self._runs[name]:
            low, high = max(start, run.start), min(stop, run.stop)
            if low < high:
                found[low - start : high - start] = run.elements[low - run.start : high - run.start]
                missing -= high - low
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {missing} elements of {name} in its {self.kind} files; copy the checkpoint again"
            )
        return found


def save_shards(shards: Sequence[Shard], folder: Path, kind: str, rank: int, **notes: str) -> None:
    """Write a rank's shards into a folder."""
    header = {shard.name: {"start": shard.start, "shape": shard.shape} for shard in shards}
    save_tensors(
        {shard.name: shard.values.contiguous() for shard in shards},
        folder / f"{kind}-rank-{rank:05d}.safetensors",
        metadata={"shards": json.dumps(header), **notes},
    )
