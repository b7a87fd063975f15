"""A user's requests to a running training: save, or save and stop.

    touch RUN/save         save and continue
    touch RUN/save_quit    save and stop; SIGTERM to any rank does the same

A checkpoint that is due by the clock is agreed on like a request. With `rollout.sample_ahead` a request may come after
the next step has begun, and waits for its end. A second SIGTERM ends a rank immediately, even if its main thread waits
in a collective. The `deepspeed` launcher repeats a SIGTERM that its whole process group received, so repeats within
REPEAT_SECONDS do not count.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from bpgo_video.distributed.mesh import Mesh
from bpgo_video.processes import end_process

REPEAT_SECONDS = 5.0
NOTICE_SECONDS = 4.0  # a launcher also sends SIGTERM after a rank's death, which ends this rank before


class Request(IntEnum):
    """A user's request, or that of the clock; the largest one that any rank received wins."""

    NONE = 0
    DUE = 1
    SAVE = 2
    STOP = 3


FILES = {"save": Request.SAVE, "save_quit": Request.STOP}


class StopRequests:
    """Receives requests inside its `with` block, in the main thread.

    Args:
        minutes: after which a checkpoint is due, on rank 0's clock; 0 for never.
    """

    def __init__(
        self, run_dir: Path, mesh: Mesh, minutes: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_dir, self._mesh, self._minutes, self._clock = run_dir, mesh, minutes, clock
        self._saved = clock()
        self._terminated = threading.Event()
        notice = "will save and stop at the end of a step; another one ends at once"
        self._notice = threading.Timer(NOTICE_SECONDS, self._report, [notice])
        self._notice.daemon = True

    def __enter__(self) -> StopRequests:
        # Python runs a signal handler only between bytecodes, never inside a collective. Its C handler writes the
        # signal to this socket, from which a thread reads it immediately. It needs some Python handler to be set.
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._old_wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGTERM, self._old_handler)
        self._writing.close()  # ends the thread
        self._notice.cancel()

    def agreed(self) -> Request:
        """The request that all ranks follow; a collective, since ranks may have received different ones."""
        received = [Request.STOP] if self._terminated.is_set() else []
        if self._mesh.is_main:
            received += [request for name, request in FILES.items() if (self._run_dir / name).exists()]
            if self._minutes and self._clock() - self._saved >= 60 * self._minutes:
                received.append(Request.DUE)
        return Request(self._mesh.largest(max(received, default=Request.NONE)))

    def fulfilled(self, request: Request, saved: str) -> None:
        """After a checkpoint: report the request for it, if it is a user's, and remove its file.

        Args:
            saved: what is saved, and where.
        """
        self._saved = self._clock()
        if request <= Request.DUE or not self._mesh.is_main:
            return
        self.remove_files()
        if request is Request.SAVE:
            print(f"saved on request, {saved}", flush=True)
        else:
            print(f"stopped on request, {saved}; continue with the same command and --run.resume auto", flush=True)

    def remove_files(self) -> None:
        """Remove request files; those that exist before a run starts were meant for an earlier one."""
        if self._mesh.is_main:
            for name in FILES:
                (self._run_dir / name).unlink(missing_ok=True)

    def _listen(self) -> None:
        first = None
        with self._reading:
            while received := self._reading.recv(1):
                if received[0] != signal.SIGTERM:
                    continue
                now = time.monotonic()
                if first is None:
                    first = now
                    self._terminated.set()
                    self._notice.start()
                elif now - first > REPEAT_SECONDS:
                    self._report("a second one: ending at once")
                    end_process(128 + signal.SIGTERM)

    def _report(self, text: str) -> None:
        sys.stderr.write(f"[rank {self._mesh.rank}] SIGTERM: {text}\n")
        sys.stderr.flush()
