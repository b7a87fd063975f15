"""How are chunks scored beside the rollout of the next ones? In order, by a thread of each rank.

What makes it safe: reward models hold no collective, so that one thread alone talks to the other ranks, also under
ZeRO-3, whose rollouts do. Rollouts draw from generators of their own, so that torch's global one is the reward
models', in the same order as without a thread. What torch keeps per thread (its number of threads, the device, the
stream) is set to the caller's; on a GPU scoring has a stream of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from queue import SimpleQueue
from types import TracebackType

import torch

from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.calls import Call
from bpgo_video.rewards.suite import RewardSuite, ScoredChunk
from bpgo_video.types import PromptBatch, RolloutChunk


@dataclass(frozen=True)
class Running:
    """A call and when it began, on the clock of time.monotonic."""

    call: Call
    began: float

    @property
    def seconds_left(self) -> float:
        return self.began + self.call.timeout - time.monotonic()


class ScoreAhead:
    """Scores chunks in their order while its caller makes the next ones; a context manager.

    Args:
        ahead: chunks that may wait or be scored while the caller goes on; 0 scores in line. The videos of one more are
            the caller's own.
    """

    def __init__(self, suite: RewardSuite, prompts: PromptBatch, ahead: int, device: torch.device):
        self.seconds = 0.0
        self._suite, self._prompts, self._ahead, self._device = suite, prompts, ahead, device
        self._chunks: SimpleQueue[RolloutChunk | None] = SimpleQueue()
        self._scored: list[ScoredChunk] = []
        self._changed = threading.Condition()
        self._unscored = 0
        self._running: Running | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        # A daemon: a model that hangs must not keep the process that ends because of it.
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name="scoring", daemon=True)

    def __enter__(self) -> ScoreAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandoned = error is not None
        self._chunks.put(None)
        if error is None:
            self._thread.join()

    def put(self, chunk: RolloutChunk) -> None:
        """Hand a chunk over; returns once at most `ahead` of them are unscored.

        Raises:
            RewardError: a model failed, on this chunk or one before, or its call has taken longer than its timeout.
        """
        if self._device.type == "cuda":  # the videos are made on the caller's stream and read on another
            torch.cuda.current_stream(self._device).synchronize()
        with self._changed:
            self._unscored += 1
        self._chunks.put(replace(chunk, trajectories=()))
        self._wait(self._ahead)

    def scores(self) -> list[ScoredChunk]:
        """What all chunks earned, in their order; raises as `put` does."""
        self._wait(0)
        return self._scored

    def _wait(self, unscored: int) -> None:
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                left = self._running.seconds_left if self._running is not None else None
                if self._running is not None and self._running.seconds_left <= 0:
                    call = self._running.call
                    raise RewardError(
                        f"{call} has not answered within its timeout of {call.timeout:g} s; raise `timeout` of that "
                        "reward if it may take longer"
                    )
                if self._unscored <= unscored:
                    return
                self._changed.wait(left)

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            with own_stream(self._device) as finish:
                for chunk in iter(self._chunks.get, None):
                    if self._abandoned:
                        return
                    self._score(chunk, finish)
                    del chunk  # its videos: the next one may be long in coming
        except BaseException as error:  # whatever it is, it ends the run where the caller waits
            with self._changed:
                self._error, self._running = error, None
                self._changed.notify_all()

    def _score(self, chunk: RolloutChunk, finish: Callable[[], None]) -> None:
        began = time.perf_counter()
        scored = self._suite.score(chunk, self._prompts, self._begin)
        finish()
        with self._changed:
            self._scored.append(scored)
            self.seconds += time.perf_counter() - began
            self._running = None
            self._unscored -= 1
            self._changed.notify_all()

    def _begin(self, call: Call) -> None:
        with self._changed:
            self._running = Running(call, time.monotonic())
            self._changed.notify_all()


@contextmanager
def own_stream(device: torch.device) -> Iterator[Callable[[], None]]:
    """Inside, this thread works on the scoring stream of a GPU; gives what waits for it. On a CPU nothing is queued."""
    if device.type != "cuda":
        yield lambda: None
        return
    stream = scoring_stream(device)
    with torch.cuda.stream(stream):
        yield stream.synchronize


@cache
def scoring_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole run: the allocator keeps freed memory for each stream apart."""
    return torch.cuda.Stream(device)
