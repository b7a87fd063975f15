"""Which samples does a rank work on, and how do their scores come together?

Ranks form data x sequence groups: rank = data_rank * sequence + sequence_rank. The ranks of one sequence group work on
the same samples, each on a part of their tokens (`ulysses.py`); sequence groups are data-parallel: each takes a
contiguous, equally long run of the step's samples in prompt-major order. A prompt's group may be split over them; its
rewards are gathered before anything is computed over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of a collective, in every group: a reward may keep a rank for as long


@dataclass(frozen=True)
class Mesh:
    """The place of this process among the ranks.

    Attributes:
        rank, world_size: over all processes.
        device: where this rank computes.
        sequence: ranks of a sequence group; divides world_size.
        sequence_group: the process group of this rank's sequence group; None where it is alone in it.
    """

    rank: int
    world_size: int
    device: torch.device
    sequence: int = 1
    sequence_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        return self.world_size // self.sequence

    def share(self, total: int, micro_batch_size: int) -> list[list[int]]:
        """This rank's items of `range(total)`, in micro-batches; equally many on every rank.

        Where `total` does not divide, the last items are repeated so that all ranks run equal numbers of equal forwards
        (ZeRO-3 gathers parameters collectively); `gather` drops the repetitions.
        """
        unit = self.data_size * micro_batch_size
        padded = -(-total // unit) * unit
        per_rank = padded // self.data_size
        mine = [min(i, total - 1) for i in range(self.data_rank * per_rank, (self.data_rank + 1) * per_rank)]
        return [mine[i : i + micro_batch_size] for i in range(0, per_rank, micro_batch_size)]

    def dealt(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share of a list that all ranks have; shares differ by one item at most, and may be empty."""
        return items[self.rank :: self.world_size]

    def part(self, count: int) -> list[int]:
        """Which of `count` items that the sequence group shares this rank takes; equally many on every rank."""
        each = -(-count // self.sequence)
        return [min(i, count - 1) for i in range(self.sequence_rank * each, (self.sequence_rank + 1) * each)]

    def gather(self, rows: Tensor, items: Sequence[int], total: int) -> Tensor:
        """All ranks' rows, one per item of `range(total)`: [total, ...]; no gradient flows.

        Args:
            rows: one per item of `items`, equally many on every rank; an item that several bring has one value.
        """
        rows, index = rows.detach().contiguous(), torch.tensor(items, device=rows.device)
        whole = rows.new_empty(total, *rows.shape[1:])
        for index_part, part in zip(self._gathered(index), self._gathered(rows), strict=True):
            whole[index_part] = part
        return whole

    def _gathered(self, rows: Tensor) -> list[Tensor]:
        if self.world_size == 1:
            return [rows]
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows)
        return parts

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, on every rank."""
        if self.world_size == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def total(self, table: Tensor) -> Tensor:
        """The sum over all ranks, on the CPU."""
        summed = table.to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(summed)
        return summed.cpu()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def make_mesh(device: torch.device, sequence: int = 1) -> Mesh:
    """The mesh of a started process group; every rank calls it, with a `sequence` that divides the world."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if sequence == 1:
        return Mesh(rank, world_size, device)
    groups = [
        dist.new_group(range(first, first + sequence), timeout=TIMEOUT) for first in range(0, world_size, sequence)
    ]
    return Mesh(rank, world_size, device, sequence, groups[rank // sequence])
