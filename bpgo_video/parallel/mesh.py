"""Which samples does a rank work on, and how do their scores come together?

All ranks are data-parallel: each takes a contiguous, equally long run of the step's samples in prompt-major order. A
group may be split over ranks; its rewards are gathered before anything is computed over a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Mesh:
    """The place of this process among the ranks.

    Attributes:
        rank, world_size: over all processes.
        device: where this rank computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, total: int, micro_batch_size: int) -> list[list[int]]:
        """This rank's items of `range(total)`, in micro-batches; equally many on every rank.

        Where `total` does not divide, the last items are repeated so that all ranks run equal numbers of equal forwards
        (ZeRO-3 gathers parameters collectively); `gather` drops the repetitions.
        """
        unit = self.world_size * micro_batch_size
        padded = -(-total // unit) * unit
        per_rank = padded // self.world_size
        mine = [min(i, total - 1) for i in range(self.rank * per_rank, (self.rank + 1) * per_rank)]
        return [mine[i : i + micro_batch_size] for i in range(0, per_rank, micro_batch_size)]

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """All ranks' rows in the order of `share`, [total, ...]; no gradient flows."""
        rows = rows.detach().contiguous()
        if self.world_size == 1:
            return rows[:total]
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)[:total]

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, on every rank."""
        if self.world_size == 1:
            return value
        found = torch.tensor(value, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
