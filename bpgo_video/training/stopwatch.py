"""Where does the time of a training step go? Seconds by phase; the other ranks hear which phase this one is in."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bpgo_video.distributed.heartbeat import Heartbeat


class Stopwatch:
    """Seconds of one step, by the names of the phases that were entered."""

    def __init__(self, heartbeat: Heartbeat, step: int) -> None:
        self.heartbeat, self.step = heartbeat, step
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.heartbeat.enter(name, self.step)
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the device would also wait for the stream that scores
        self.seconds[name] += time.perf_counter() - started

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started

    @property
    def record(self) -> dict[str, float]:
        """What the step's record says of them."""
        return {**{f"seconds/{name}": seconds for name, seconds in self.seconds.items()}, "seconds": self.total}
