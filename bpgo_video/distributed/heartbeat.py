"""The watchdog of a world of ranks: if one dies or fails, every other rank names it and exits.

Collectives time out after half an hour because a reward may take that long. So a thread of each rank reports in a
shared store that the rank is alive; a rank whose thread reports is slow, not dead. The main thread cannot be
interrupted inside a collective, so the thread ends the whole process. Code that holds Python's interpreter lock for
longer than the timeout looks like a death.

    member-R   rank R's host and process
    beat-R     a counter that grows while rank R is alive, with its current phase and step
    verdict    empty, or the first rank that died or failed, with the message for the user and the exit code

The message is printed once on every host (`errors.py`): by the rank that fails before it publishes the verdict, or by
the first that reads it.

Rank 0 reads all beats; the others read rank 0's beat and the verdict, so their cost does not grow with the world. Ranks
on one machine also check each other's processes. Hosts' clocks differ, so a rank counts as silent if its counter does
not change for the timeout on the reader's clock.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from bpgo_video.distributed.mesh import Mesh, OtherRankError
from bpgo_video.errors import exit_code, explained, named, tell, traced
from bpgo_video.processes import end_process, machine, start_time

LONGEST_INTERVAL = 2.0  # seconds between two beats
BEATS_PER_TIMEOUT = 4
OWN_ERROR_SECONDS = 1.0  # for a rank to end by its own exception if all ranks raise the same one
FAREWELL_SECONDS = 10.0  # for the other ranks to read the verdict before rank 0, which holds the store, exits
LONGEST_MESSAGE = 2000  # characters of an error
GLOO = re.compile(r"\bgloo\b")  # gloo's errors name their source file; a prompt may contain "igloo"
VERDICT = "verdict"


@dataclass(frozen=True)
class Member:
    """A rank's process; the start time distinguishes it from a later process with the same pid."""

    rank: int
    host: str
    machine: str
    pid: int
    started: str | None

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Beat:
    """A rank's latest report.

    Attributes:
        count: grows with every report.
        phase, step: of the rank's main thread; no step outside the training loop.
        left: the rank has finished; its silence is no death.
    """

    count: int = 0
    phase: str = "start"
    step: int | None = None
    left: bool = False

    @property
    def where(self) -> str:
        return f"in phase {self.phase}" + ("" if self.step is None else f" of step {self.step}")


@dataclass(frozen=True)
class Verdict:
    """The rank that ended first, how, and the exit code of all."""

    rank: int
    text: str
    code: int = 1


class Liveness:
    """One rank's view of the others. Created on all ranks together.

    Args:
        me: this rank.
        timeout: seconds without a beat after which a rank counts as dead.
    """

    def __init__(self, store: dist.Store, me: Member, world_size: int, timeout: float):
        self._store, self._rank, self._timeout = store, me.rank, timeout
        if me.rank == 0:
            store.set(VERDICT, "")
        self.publish(Beat())
        store.set(f"member-{me.rank}", json.dumps(asdict(me)))
        members = store.multi_get([f"member-{rank}" for rank in range(world_size)])  # waits for all
        self.members = [Member(**json.loads(text)) for text in members]
        others = [member for member in self.members if member.rank != me.rank]
        self._neighbours = [member for member in others if me.machine and member.machine == me.machine]
        self._watched = [member.rank for member in others] if me.rank == 0 else [0]
        now = time.monotonic()
        self._seen = {member.rank: (Beat(), now) for member in self.members}  # latest beat, and when it changed

    def publish(self, beat: Beat) -> None:
        self._store.set(f"beat-{self._rank}", json.dumps(asdict(beat)))

    def check(self) -> Verdict | None:
        """The rank that ended first, if any; the same on all ranks while the store exists.

        Raises:
            DistError: the store does not answer; then use `store_lost`.
        """
        for member in [one for one in self._neighbours if start_time(one.pid) != one.started]:
            if member.rank == 0:  # the store died with it; a request would only print a C++ stack trace
                return self.store_lost("died")
            beat = self._beats([member.rank])[member.rank]
            if not beat.left:
                return self.report(Verdict(member.rank, f"{member} died {beat.where}"))
            self._neighbours.remove(member)
        (published,) = self._store.multi_get([VERDICT])
        return Verdict(**json.loads(published)) if published else self._silent()

    def _silent(self) -> Verdict | None:
        now = time.monotonic()
        for rank, beat in self._beats(self._watched).items():
            last, since = self._seen[rank]
            if beat.left or beat.count != last.count:
                self._seen[rank] = beat, now
            elif now - since > self._timeout:
                silence = f"has been silent for {now - since:.0f} s; it was {beat.where}"
                return self.report(Verdict(rank, f"{self.members[rank]} {silence}"))
        return None

    def store_lost(self, how: str = "died or cannot be reached") -> Verdict:
        """The verdict without a store, which is part of rank 0's process: rank 0 ended."""
        return Verdict(0, f"{self.members[0]} {how}; when last heard, it was {self._seen[0][0].where}")

    def report(self, verdict: Verdict) -> Verdict:
        """Publish a verdict unless there is one; the published one."""
        return Verdict(**json.loads(self._store.compare_set(VERDICT, "", json.dumps(asdict(verdict)))))

    def remaining(self, ended: Verdict | None = None) -> list[int]:
        """The watched ranks that have not left, except the one that the verdict names."""
        beats = self._beats(self._watched)
        return [rank for rank, beat in beats.items() if not (beat.left or (ended and ended.rank == rank))]

    def _beats(self, ranks: Sequence[int]) -> dict[int, Beat]:
        texts = self._store.multi_get([f"beat-{rank}" for rank in ranks])
        return {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}


class Heartbeat:
    """Watches the ranks inside its `with` block, which all ranks enter and leave.

    A rank that leaves with an exception ends the others. If that only follows from the end of another rank, it waits
    until the watchdog knows which rank that was.

    Args:
        timeout: seconds without a beat after which a rank counts as dead.
        advice: what the user should do after a death or an unexpected error; ends the message.
        expected: errors that their message explains; others are printed with their innermost calls.
    """

    _instances = itertools.count()  # each has its own keys in the store; all ranks count alike

    def __init__(self, mesh: Mesh, timeout: float, advice: str = "", expected: tuple[type[Exception], ...] = ()):
        self._mesh, self._timeout, self._advice, self._expected = mesh, timeout, advice, expected
        self._beat, self._publishing = Beat(), threading.Lock()
        self._ended, self._closed = threading.Event(), threading.Event()
        self._interval = min(LONGEST_INTERVAL, timeout / BEATS_PER_TIMEOUT)
        self._unanswered = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        if self._mesh.world_size == 1:
            return self
        connection = _get_default_store().clone()  # type: ignore[attr-defined]  # the main thread may block in its own
        store = dist.PrefixStore(f"heartbeat-{next(Heartbeat._instances)}", connection)
        pid = os.getpid()
        me = Member(self._mesh.rank, socket.gethostname(), machine(), pid, start_time(pid))
        self._liveness = Liveness(store, me, self._mesh.world_size, self._timeout)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="heartbeat-guard", daemon=True).start()
        return self

    def enter(self, phase: str, step: int | None = None) -> None:
        """Report what this rank does from now on; `step` counts as in metrics.jsonl."""
        if self._thread is not None:
            self._publish(phase=phase, step=step)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._thread is None:
            return
        if error is None:
            self._leave()
        elif is_consequence(error):  # the thread finds out which rank ended, and ends this process
            self._thread.join(self._timeout + 2 * LONGEST_INTERVAL + FAREWELL_SECONDS)
        self._ended.set()
        if error is not None:
            self._fail(error)
        self._thread.join()
        self._closed.set()

    def _publish(self, **changes: Any) -> None:
        with self._publishing:
            self._beat = replace(self._beat, count=self._beat.count + 1, **changes)
            self._liveness.publish(self._beat)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            try:
                verdict = self._liveness.check()
                if verdict is None:
                    self._publish()
            except dist.DistError:
                verdict = self._liveness.store_lost()
            self._unanswered = 0
            if verdict is not None and not self._ended.wait(OWN_ERROR_SECONDS):
                self._end(verdict)

    def _guard(self) -> None:
        """End this rank if a request to the store hangs, as it does if rank 0's host is frozen or unreachable.

        Counts intervals instead of reading a clock, because a suspended process was not waiting for an answer.
        """
        while not self._closed.wait(self._interval):
            self._unanswered += 1
            if self._unanswered * self._interval > self._timeout:
                self._end(self._liveness.store_lost())

    def _fail(self, error: BaseException) -> None:
        """Print this rank's error, then end the others by it."""
        me = self._liveness.members[self._mesh.rank]
        text = f"{me} failed {self._beat.where}: {named(error)}"
        explains_itself = isinstance(error, self._expected)
        outside_steps = explains_itself and self._beat.step is None
        if outside_steps:
            text = ": ".join([*getattr(error, "__notes__", [str(me)]), str(error)])
        verdict = Verdict(me.rank, text[:LONGEST_MESSAGE], exit_code(error))
        message = explained(error) if outside_steps else self._message(verdict)
        tell(message if explains_itself else traced(error, message))
        with suppress(dist.DistError):  # rank 0 is gone, which all others see
            self._leave(self._liveness.report(verdict))

    def abort(self, error: Exception) -> NoReturn:
        """End all ranks now, from any thread, by an error that its message explains."""
        verdict = Verdict(self._mesh.rank, str(error)[:LONGEST_MESSAGE], exit_code(error))
        if self._thread is not None:
            with suppress(dist.DistError):  # rank 0 is gone, which all others see
                self._end(self._liveness.report(verdict))
        tell(self._message(verdict))
        end_process(verdict.code)

    def _end(self, verdict: Verdict) -> NoReturn:
        try:
            tell(self._message(verdict))
            if verdict.rank != 0 or self._mesh.is_main:
                self._leave(verdict)
        finally:  # whatever else fails, this process must end
            end_process(verdict.code)

    def _message(self, verdict: Verdict) -> str:
        """What to print; an error with exit code 2 says itself what to do."""
        others = f"; the other ranks end too. {self._advice}" if verdict.code == 1 else ""
        return f"error: {verdict.text}{others}".rstrip()

    def _leave(self, verdict: Verdict | None = None) -> None:
        """Report that this rank has finished. Rank 0, which holds the store, stays until the others have read it."""
        self._publish(left=True)
        deadline = time.monotonic() + (math.inf if verdict is None else FAREWELL_SECONDS)
        while self._mesh.is_main and time.monotonic() < deadline and self._liveness.remaining(verdict):
            self._unanswered = 0
            time.sleep(0.05)


def is_consequence(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, says that another rank failed or does not answer."""
    while error is not None:
        from_gloo = isinstance(error, RuntimeError) and GLOO.search(str(error))
        if from_gloo or isinstance(error, (dist.DistError, OtherRankError)):
            return True
        error = error.__cause__ or error.__context__
    return False
