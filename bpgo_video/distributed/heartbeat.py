"""How do the other ranks end when one dies? A thread of each tells that it lives, and ends its process on a verdict.

Collectives wait for half an hour, because a reward may take that long; a rank whose thread still beats is slow and not
dead. A main thread inside a collective cannot be interrupted, so the thread ends the whole process. A thread of Python
needs the interpreter's lock: code that keeps it for longer than the timeout looks like a death.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import socket
import sys
import threading
import time
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from bpgo_video.distributed.liveness import Beat, Liveness, Member, Verdict, introduce
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.processes import this_process

LONGEST_INTERVAL = 2.0  # seconds between two beats
BEATS_PER_TIMEOUT = 4
OWN_ERROR_SECONDS = 1.0  # that a rank has to end by its own error, where all ranks make the same one
FAREWELL_SECONDS = 10.0  # that rank 0, who keeps the store, gives the others to read the verdict
LONGEST_MESSAGE = 1000  # characters of an error that are told to the other ranks
EXIT_CODE = 1
GLOO = re.compile(r"\bgloo\b")  # as its errors name their file; an igloo may be in a prompt


class Heartbeat:
    """Watches over the ranks from `with` to its end; entered and left by all of them.

    A rank that leaves by an exception ends the others, which name it and its message. A collective that fails because
    its peer is gone ends this rank only when it is known who died.

    Args:
        timeout: seconds without a beat after which a rank counts as dead.
        advice: what a user should do then.
    """

    _instances = itertools.count()  # each has keys of its own in the store; all ranks count alike

    def __init__(self, mesh: Mesh, timeout: float, advice: str = ""):
        self._mesh, self._timeout, self._advice = mesh, timeout, advice
        self._beat = Beat()
        self._telling = threading.Lock()
        self._ended, self._closed = threading.Event(), threading.Event()
        self._interval = min(LONGEST_INTERVAL, timeout / BEATS_PER_TIMEOUT)
        self._unanswered = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        if self._mesh.world_size == 1:
            return self
        # A connection of its own: the main thread may wait in the store for a long time.
        connection = _get_default_store().clone()  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"heartbeat-{next(Heartbeat._instances)}", connection)
        me = Member(self._mesh.rank, socket.gethostname(), this_process())
        members = introduce(store, me, self._mesh.world_size)
        self._liveness = Liveness(store, self._mesh.rank, members, self._timeout)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="heartbeat-guard", daemon=True).start()
        return self

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say what this rank does from now on; `step` counts as in metrics.jsonl."""
        if self._thread is not None:
            self._tell(phase=phase, step=step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is None:
            self._leave()
        elif is_lost_contact(error):  # the thread finds out who died, and ends this process
            self._thread.join(self._timeout + 2 * LONGEST_INTERVAL + FAREWELL_SECONDS)
        self._ended.set()
        if error is not None:
            self._fail(error)
        self._thread.join()
        self._closed.set()

    def _tell(self, **changes: Any) -> None:
        with self._telling:
            self._beat = replace(self._beat, count=self._beat.count + 1, **changes)
            self._liveness.tell(self._beat)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            verdict = self._look()
            self._unanswered = 0
            if verdict is not None and not self._ended.wait(OWN_ERROR_SECONDS):
                self._end(verdict)

    def _guard(self) -> None:
        """End this rank where the store does not even fail: a request to a frozen or unreachable host waits for ever.

        Intervals are counted, and no clock is read, since a thread that could not run was not waiting for an answer.
        """
        while not self._closed.wait(self._interval):
            self._unanswered += 1
            if self._unanswered * self._interval > self._timeout:
                self._end(self._liveness.without_store())

    def _look(self) -> Verdict | None:
        try:
            verdict = self._liveness.judge()
            if verdict is None:
                self._tell()
            return verdict
        except dist.DistError:
            return self._liveness.without_store()

    def _leave(self) -> None:
        self._tell(left=True)
        self._wait_for_the_others()

    def _fail(self, error: BaseException) -> None:
        what = f"failed {self._beat.where}: {type(error).__name__}: {error}"
        try:
            self._leave_on(self._liveness.pronounce(self._mesh.rank, what[:LONGEST_MESSAGE]))
        except dist.DistError:
            print(f"[rank {self._mesh.rank}] rank 0 is gone; nobody is there to tell", file=sys.stderr, flush=True)

    def _end(self, verdict: Verdict) -> None:
        text = f"[rank {self._mesh.rank}] {verdict.text}; this rank, {self._beat.where}, ends too. {self._advice}"
        try:
            sys.stdout.flush()
            sys.stderr.write(text.rstrip() + "\n")  # in one piece among the lines of other ranks
            sys.stderr.flush()
            if verdict.rank != 0 or self._mesh.is_main:
                self._leave_on(verdict)
        finally:  # whatever else has gone since, this process must not stay
            os._exit(EXIT_CODE)

    def _leave_on(self, verdict: Verdict) -> None:
        self._tell(left=True)
        self._wait_for_the_others(verdict, FAREWELL_SECONDS)

    def _wait_for_the_others(self, verdict: Verdict | None = None, at_most: float = math.inf) -> None:
        """Rank 0 stays until the others have read what is in the store, which goes with it."""
        latest = time.monotonic() + at_most
        while self._mesh.is_main and time.monotonic() < latest and self._liveness.remaining(verdict):
            self._unanswered = 0
            time.sleep(0.05)


def is_lost_contact(error: BaseException | None) -> bool:
    """Whether an exception, or the one in whose handling it was raised, says that a peer does not answer."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and GLOO.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False
