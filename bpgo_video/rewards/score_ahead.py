"""Scoring of a rollout's videos ahead of time, in a thread.

A thread of each rank scores chunks, in order, while the main thread samples the next ones. This is safe because reward
models run no collectives: only one thread communicates with other ranks, also under ZeRO-3, where rollouts communicate.
Rollouts draw from their own generators, so only reward models draw from torch's global one, in the same order as
without a thread. The thread takes over its caller's number of threads; on a GPU it scores on a stream of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from queue import SimpleQueue

import torch

from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.groups import WholeGroups
from bpgo_video.rewards.reward import Call
from bpgo_video.rewards.suite import RewardSuite, ScoredChunk
from bpgo_video.types import PromptBatch, RolloutChunk


class ScoreAhead:
    """Scores chunks in order while its caller makes the next ones; a context manager around `put`.

    Args:
        ahead: number of unscored chunks with which `put` returns; with 0 it waits for the score. The caller holds the
            videos of one more.
        after: chunks that are scored before, and count as unscored ones until then.
        group_size: samples of each prompt. Rewards that compare them score when the last chunk of a group is scored;
            the group's videos are on the CPU until then, .36 GiB for 81 frames at 480x832.

    Attributes:
        seconds: that scoring took.
    """

    def __init__(
        self,
        suite: RewardSuite,
        prompts: PromptBatch,
        ahead: int,
        device: torch.device,
        after: ScoreAhead | None = None,
        group_size: int = 1,
    ):
        self.seconds = 0.0
        self._after = after
        self._suite, self._prompts, self._ahead, self._device = suite, prompts, ahead, device
        self._chunks: SimpleQueue[RolloutChunk | None] = SimpleQueue()
        self._scored: list[ScoredChunk] = []
        self._groups, self._scored_groups = WholeGroups(group_size), list[ScoredChunk]()
        self._changed = threading.Condition()
        self._queued = 0
        self._running: tuple[Call, float] | None = None  # and its deadline, on the clock of time.monotonic
        self._error: BaseException | None = None
        self._abandoned = False
        # A daemon: a model that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name="scoring", daemon=True)

    def __enter__(self) -> ScoreAhead:
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._abandoned = error is not None
        self._chunks.put(None)

    def put(self, chunk: RolloutChunk) -> None:
        """Queues a chunk; returns once at most `ahead` chunks are unscored.

        Raises:
            RewardError: a model failed, on this chunk or an earlier one, or its call has exceeded its timeout.
        """
        if self._device.type == "cuda":  # the caller's stream makes the videos, another one reads them
            torch.cuda.current_stream(self._device).synchronize()
        self._queued += 1
        self._chunks.put(replace(chunk, trajectories=()))
        if (before := self._after) is not None:
            before._wait(max(0, self._ahead - self._queued))
        self._wait(self._ahead)

    def scores(self) -> list[ScoredChunk]:
        """Scores of all chunks, in order, then of all groups, after the last `put`; raises as `put` does."""
        self._wait(0)
        self._groups.require_none(self._prompts)
        return self._scored + self._scored_groups

    def _wait(self, unscored: int) -> None:
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                left = None
                if self._running is not None:
                    call, deadline = self._running
                    left = deadline - time.monotonic()
                    if left <= 0:
                        late = f"{call} has not answered within its timeout of {call.timeout:g} s"
                        raise RewardError(f"{late}; raise `timeout` of that reward if it may take longer")
                if self._queued - len(self._scored) <= unscored:
                    return
                self._changed.wait(left)

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        if self._after is not None:
            self._after._thread.join()
            self._after = None
        try:
            with scoring_stream(self._device) as synchronize:
                for chunk in iter(self._chunks.get, None):
                    if self._abandoned:
                        return
                    started = time.perf_counter()
                    scored = self._suite.score(chunk, self._prompts, self._begin)
                    for group in self._groups.completed_by(chunk) if self._suite.groupwise else ():
                        self._scored_groups.append(self._suite.score(group, self._prompts, self._begin, groupwise=True))
                        del group
                    synchronize()
                    del chunk  # frees its videos before the wait for the next one
                    with self._changed:
                        self._scored.append(scored)
                        self.seconds += time.perf_counter() - started
                        self._running = None
                        self._changed.notify_all()
        except BaseException as error:  # raised in the caller's thread, which ends the run
            with self._changed:
                self._error, self._running = error, None
                self._changed.notify_all()

    def _begin(self, call: Call) -> None:
        with self._changed:
            self._running = call, time.monotonic() + call.timeout
            self._changed.notify_all()


@contextmanager
def scoring_stream(device: torch.device) -> Iterator[Callable[[], None]]:
    """On a GPU this thread uses the scoring stream inside the block; yields a function that waits for the stream."""
    if device.type != "cuda":
        yield lambda: None
        return
    stream = _stream(device)
    with torch.cuda.stream(stream):
        yield stream.synchronize


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole run: the allocator keeps freed memory for each stream separately."""
    return torch.cuda.Stream(device)
