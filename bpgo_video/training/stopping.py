"""Has someone asked this run to stop, or to save? By SIGTERM, or by a file in its folder; agreed at the end of a step.

    touch RUN/save         saves and goes on
    touch RUN/save_quit    saves and stops; SIGTERM to any rank does the same

One rank may have heard what the others have not, so `agreed` is a collective. A second SIGTERM ends a rank at once,
even one whose main thread waits for others. The `deepspeed` launcher repeats a SIGTERM that its whole process group has
received; what comes within INSISTING_SECONDS of the first is no second one.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType

from bpgo_video.distributed.mesh import Mesh

INSISTING_SECONDS = 5.0


class Request(IntEnum):
    """Ordered: the largest that any rank has heard is obeyed."""

    NONE = 0
    SAVE = 1
    STOP = 2


FILES = {"save": Request.SAVE, "save_quit": Request.STOP}


class StopRequests:
    """Hears requests from `with` to its end; of the main thread, as Python's signals are."""

    def __init__(self, run_dir: Path, mesh: Mesh):
        self._run_dir, self._mesh = run_dir, mesh
        self._terminated = threading.Event()

    def __enter__(self) -> StopRequests:
        # Python runs a handler only between two of its own instructions, never inside a collective. What its C handler
        # writes to this socket reaches a thread at once.
        self._read, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._handler = signal.signal(signal.SIGTERM, _heard_by_the_thread)
        self._descriptor = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._descriptor)
        signal.signal(signal.SIGTERM, self._handler)
        self._written.close()  # ends the thread

    def agreed(self) -> Request:
        """What is asked for; all ranks call it, and get the same answer."""
        heard = [Request.STOP] if self._terminated.is_set() else []
        if self._mesh.is_main:
            heard += [request for name, request in FILES.items() if (self._run_dir / name).exists()]
        return Request(self._mesh.largest(max(heard, default=Request.NONE)))

    def obeyed(self, request: Request, saved: str) -> None:
        """Take a request off the table and tell the user, once the checkpoint is there.

        Args:
            saved: what is saved, and where.
        """
        if request is Request.NONE or not self._mesh.is_main:
            return
        self.forget_files()
        if request is Request.SAVE:
            print(f"saved as asked, {saved}", flush=True)
        else:
            print(f"stopped as asked, {saved}; go on with the same command and --run.resume auto", flush=True)

    def forget_files(self) -> None:
        """Remove the files; those that are there before a run begins were meant for an earlier launch."""
        if self._mesh.is_main:
            for name in FILES:
                (self._run_dir / name).unlink(missing_ok=True)

    def _listen(self) -> None:
        first = None
        with self._read:
            while received := self._read.recv(1):
                if received[0] != signal.SIGTERM:
                    continue
                now = time.monotonic()
                if first is None:
                    first = now
                    self._terminated.set()
                    self._say("will save and stop at the end of this step; another one ends at once")
                elif now - first > INSISTING_SECONDS:
                    self._say("a second one: ending at once")
                    os._exit(128 + signal.SIGTERM)

    def _say(self, what: str) -> None:
        sys.stderr.write(f"[rank {self._mesh.rank}] SIGTERM: {what}\n")
        sys.stderr.flush()


def _heard_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Without a handler of its own in Python, a signal is not written to the wakeup socket."""
