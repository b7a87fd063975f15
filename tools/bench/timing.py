"""Wall times, medians of alternating measurements, and time spent waiting for other ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work

Clock = Callable[[], float]


def seconds(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, started by all ranks at the same time: wall time, unless `clock` is `time.process_time`."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    _synchronise()
    started = clock()
    work()
    _synchronise()
    return clock() - started


def in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each after a warm-up, measured alternately so that a drift of the machine affects all alike."""
    for work in works.values():
        work()
    measured: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            measured[name].append(seconds(work, clock))
    return {name: statistics.median(times) for name, times in measured.items()}


@dataclass
class Waiting:
    """Seconds spent waiting for collectives."""

    seconds: float = 0.0


@contextmanager
def waiting() -> Iterator[Waiting]:
    """Count the time inside the block that this rank's main thread waits in collectives, including for slower peers.

    This measures gloo on CPUs, not NCCL: on a GPU, a wait only orders streams.
    """
    total, wait = Waiting(), Work.wait

    def timed(self: Work, *args: object) -> object:
        started = time.perf_counter()
        done = wait(self, *args)
        total.seconds += time.perf_counter() - started
        return done

    Work.wait = timed
    try:
        yield total
    finally:
        Work.wait = wait


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
