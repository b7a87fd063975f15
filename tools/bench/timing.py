"""How long does something take, and how much of that is waiting for other ranks?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, with every rank starting together."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    _synchronise()
    started = time.perf_counter()
    work()
    _synchronise()
    return time.perf_counter() - started


def in_turn(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each after a first call, taken alternately so that a drift of the machine touches all alike."""
    for work in works.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name].append(seconds(work))
    return {name: statistics.median(times) for name, times in found.items()}


@dataclass
class Waiting:
    """Seconds spent waiting for collectives."""

    seconds: float = 0.0


@contextmanager
def waiting() -> Iterator[Waiting]:
    """Counts, inside the block, the time that this rank's main thread waits in collectives, slower peers included.

    On a GPU a wait only orders streams, so that this says what gloo on CPUs costs and nothing about NCCL.
    """
    found, wait = Waiting(), Work.wait

    def timed(self: Work, *args: object) -> object:
        started = time.perf_counter()
        done = wait(self, *args)
        found.seconds += time.perf_counter() - started
        return done

    Work.wait = timed
    try:
        yield found
    finally:
        Work.wait = wait


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
