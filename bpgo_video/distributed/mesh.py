"""The mesh of ranks: data-parallel groups of sequence-parallel ranks, rank = data_rank * sequence + sequence_rank.

The ranks of one sequence group process the same samples, each a part of their tokens (`ulysses.py`). The sequence
groups are data-parallel: each takes a contiguous run of the step's samples, in prompt-major order and of equal length.
A prompt's samples may be spread over several groups, so their rewards are gathered before any statistic of a prompt is
computed.

Ranks agree on errors and inputs. Otherwise an error on one node (a missing file, another version) would leave the other
ranks waiting in their next collective, and inputs that differ would train a model that no recipe describes.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of a collective in any group: a reward may keep a rank busy for that long
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Mesh:
    """This process's position among the ranks.

    Attributes:
        rank, world_size: over all processes.
        device: of this rank.
        sequence: ranks per sequence group; divides world_size.
        sequence_group: the process group of this rank's sequence group; None if it has a single rank.
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
        """This rank's items of `range(total)`, in micro-batches of equal size and number on every rank.

        ZeRO-3 gathers parameters collectively, so every rank must run the same number of forwards. Where `total` does
        not divide, the last item is repeated; `gather` drops the repetitions.
        """
        unit = self.data_size * micro_batch_size
        per_rank = -(-total // unit) * micro_batch_size
        items = [min(i, total - 1) for i in range(self.data_rank * per_rank, (self.data_rank + 1) * per_rank)]
        return [items[i : i + micro_batch_size] for i in range(0, per_rank, micro_batch_size)]

    def round_robin(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's items of a list that all ranks have; possibly none. Lengths differ by at most one."""
        return items[self.rank :: self.world_size]

    def part(self, count: int) -> list[int]:
        """This rank's indices of `range(count)`, split over the sequence group; equally many on every rank."""
        each = -(-count // self.sequence)
        return [min(i, count - 1) for i in range(self.sequence_rank * each, (self.sequence_rank + 1) * each)]

    def gather(self, rows: Tensor, items: Sequence[int], total: int) -> Tensor:
        """All ranks' rows, one per item of `range(total)`: [total, ...]; detached.

        Args:
            rows: one per item of `items`, equally many on every rank; repeated items must have equal rows.
        """
        rows, index = rows.detach().contiguous(), torch.tensor(items, device=rows.device)
        whole = rows.new_empty(total, *rows.shape[1:])
        for index_part, row_part in zip(self._all_gather(index), self._all_gather(rows), strict=True):
            whole[index_part] = row_part
        return whole

    def _all_gather(self, rows: Tensor) -> list[Tensor]:
        if self.world_size == 1:
            return [rows]
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows)
        return parts

    def largest(self, value: int) -> int:
        """The largest value over all ranks."""
        return int(self._all_reduce(torch.tensor(value, device=self.device), dist.ReduceOp.MAX))

    def total(self, table: Tensor) -> Tensor:
        """The sum over all ranks, on the CPU."""
        return self._all_reduce(table.to(self.device, copy=True), dist.ReduceOp.SUM).cpu()

    def _all_reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(values, op=operation)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def make_mesh(device: torch.device, sequence: int = 1) -> Mesh:
    """The mesh of an initialized process group. Collective; `sequence` must divide the world size."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if sequence == 1:
        return Mesh(rank, world_size, device)
    groups = [
        dist.new_group(range(first, first + sequence), timeout=TIMEOUT) for first in range(0, world_size, sequence)
    ]
    return Mesh(rank, world_size, device, sequence, groups[rank // sequence])


class OtherRankError(ConfigError):
    """Another rank failed and tells why; this one had no error."""


def from_all(value: T, mesh: Mesh) -> list[T]:
    """Every rank's value, ordered by rank."""
    values: list[Any] = [value] * mesh.world_size
    if mesh.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def from_main(value: T, mesh: Mesh) -> T:
    """Rank 0's value."""
    return from_all(value, mesh)[0]


@contextmanager
def all_or_none(mesh: Mesh) -> Iterator[None]:
    """Raise on every rank if the block raises on any. The block must not communicate.

    An error that not all ranks have gets a note with its rank and host.

    Raises:
        OtherRankError: the block raised on other ranks only; the message gives the first one's rank, host and error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # the other ranks wait in the next line, so communicate first and raise later
        error = caught
    outcomes = from_all((f"rank {mesh.rank} on {socket.gethostname()}", error and f"{error}"), mesh)
    failed = [(rank, message) for rank, message in outcomes if message is not None]
    others = f" (and {len(failed) - 1} more of {mesh.world_size} ranks)" if len(failed) > 1 else ""
    if error is not None:
        if len(failed) < mesh.world_size:
            error.add_note(f"{outcomes[mesh.rank][0]}{others}")
        raise error
    if failed:
        time.sleep(POLL_SECONDS)  # the failed rank, which knows more, tells first
        raise OtherRankError(f"{failed[0][0]}{others}: {failed[0][1]}")


def same_everywhere(values: Mapping[str, str], mesh: Mesh) -> None:
    """Check that every rank has the same `values`, by their hashes.

    Raises:
        ConfigError: on every rank; names the first host that differs from rank 0's, and the values that differ.
    """
    hashes = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in values.items()}
    everyone = from_all((socket.gethostname(), hashes), mesh)
    main_host, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        if differing := [name for name in expected if found[name] != expected[name]]:
            raise ConfigError(
                f"rank {rank} on {host} differs from rank 0 on {main_host} in: {', '.join(differing)}; every node "
                "needs the same command, files and packages: see docs/multi_node.md"
            )
