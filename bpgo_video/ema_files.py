"""How does an average outlive its run? One safetensors file a rank in each checkpoint, readable on any number of ranks.

    RUN/checkpoints/step-000050/ema-rank-00000.safetensors

A file holds the flat shards of its rank by parameter name; its header says where in the parameter each begins, and what
shape that has. So any rank can pick its elements out of all files, and the whole average comes together without ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bpgo_video.ema import EMA
from bpgo_video.master_weights import Shard
from bpgo_video.zero_files import CheckpointError

FILES = "ema-rank-*.safetensors"


@dataclass(frozen=True)
class Run:
    """A run of elements of one parameter, in an open file."""

    start: int
    stop: int
    elements: Any


class SavedAverage:
    """The average in a checkpoint's folder, its files open from `with` to its end.

    Attributes:
        updates: that have gone into it.
        shapes: of the whole parameters.

    Raises:
        CheckpointError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.updates = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._runs: dict[str, list[Run]] = {}
        self._files = ExitStack()

    def __enter__(self) -> SavedAverage:
        paths = sorted(self.folder.glob(FILES))
        if not paths:
            raise CheckpointError(
                f"{self.folder} holds no {FILES}: its run kept no average of the weights; take the raw ones, or train "
                "with ema.decay above 0"
            )
        for path in paths:
            file = self._files.enter_context(safe_open(path, framework="pt"))
            header = json.loads(file.metadata()["shards"])
            self.updates = int(file.metadata()["updates"])
            for name in file.keys():  # noqa: SIM118, it is no dict
                elements = file.get_slice(name)
                start = header[name]["start"]
                self.shapes[name] = tuple(header[name]["shape"])
                self._runs.setdefault(name, []).append(Run(start, start + elements.get_shape()[0], elements))
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def elements(self, shard: Shard) -> Tensor:
        """What the average has in place of a shard's values, whichever ranks wrote it; [elements], fp32, on the CPU.

        Raises:
            CheckpointError: the parameter has another shape, or a file is missing.
        """
        if self.shapes.get(shard.name) != shard.shape:
            raise CheckpointError(
                f"the average in {self.folder} has {shard.name} as {self.shapes.get(shard.name)}, the model as "
                f"{shard.shape}; is it a checkpoint of this model?"
            )
        return self._read(shard.name, shard.start, shard.start + shard.values.numel())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every averaged parameter, whole and fp32, one in memory at a time."""
        for name, shape in self.shapes.items():
            yield name, self._read(name, 0, prod(shape)).reshape(shape)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        found, missing = torch.empty(stop - start), stop - start
        for run in self._runs[name]:
            low, high = max(start, run.start), min(stop, run.stop)
            if low < high:
                found[low - start : high - start] = run.elements[low - run.start : high - run.start]
                missing -= high - low
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {missing} elements of the average of {name}; copy the checkpoint again"
            )
        return found


def save_average(ema: EMA, folder: Path, rank: int) -> None:
    """Write this rank's shards of the average into a checkpoint's folder."""
    header = {shard.name: {"start": shard.start, "shape": shard.shape} for shard in ema.shards}
    save_file(
        {shard.name: shard.values.contiguous() for shard in ema.shards},
        folder / f"ema-rank-{rank:05d}.safetensors",
        metadata={"shards": json.dumps(header), "updates": str(ema.updates)},
    )


def load_average(ema: EMA, folder: Path) -> None:
    """Continue the average in a checkpoint of any number of ranks and any stage.

    Raises:
        CheckpointError: it holds none, or one of another model.
    """
    with SavedAverage(folder) as saved:
        for shard in ema.shards:
            shard.values.copy_(saved.elements(shard))
        ema.updates = saved.updates


def average_in(folder: Path) -> dict[str, Tensor]:
    """The whole average in a checkpoint, fp32 by parameter name: what `ZeroParameters` are to the raw weights.

    Raises:
        CheckpointError: the run kept none, or files are missing.
    """
    with SavedAverage(folder) as saved:
        return dict(saved.tensors())
