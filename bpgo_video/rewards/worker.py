"""A reward model in a child process with an interpreter of its own, for packages that conflict with ours.

The process runs a script that imports `bpgo_video/worker_side/reward_worker.py`; docs/rewards.md shows one. It answers
each line of JSON with one.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import bpgo_video
from bpgo_video.rewards.base import Clips, Device, FrameScores
from bpgo_video.rewards.wire import OWN_SHARE, DescribedModel, MalformedMessage, packed, scores_of

WORKER_SIDE = Path(bpgo_video.__file__).parent / "worker_side"
MAX_LINE = 64 * 2**20  # bytes of one reply
SHOWN = 200  # characters of a line that is no reply


class WorkerReward(DescribedModel):
    """A reward model in a child process of this rank.

    The worker has its own process group: signals to the run's group are for the run to handle. It ends with this
    object, and by itself where this process ends in another way.

    Args:
        python: the interpreter, for example `/opt/videoscore/bin/python`.
        script: what it runs.
        settings: keyword arguments of the model that the script serves.
        environment: variables in addition to those of this process.
        start_timeout: seconds until the worker has described its model; it loads the model in them.
        restarts: how often in a run a worker that died is started again, and receives the call again.
        timeout: seconds that a call may take, restarts included.

    Raises:
        OSError: no such interpreter or script, or the worker ended, or was not ready in time.
        MalformedMessage: its description is malformed.
    """

    def __init__(
        self, python: str, script: str, settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None, start_timeout: float = 600.0, restarts: int = 2,
        timeout: float = 1500.0, device: Device = "cpu",
    ):  # fmt: skip
        if not Path(script).is_file():
            raise FileNotFoundError(f"the worker's script {script!r} does not exist")
        self._memory = anonymous_file()
        arguments = {"memory": self._memory.fileno(), "device": str(device), "settings": dict(settings or {})}
        self._command = [python, script, json.dumps(arguments)]
        paths = (str(WORKER_SIDE), os.environ.get("PYTHONPATH", "") if python == sys.executable else "")
        path = os.pathsep.join(filter(None, paths))  # our packages are not for another interpreter
        self._environment = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        self._restarts, self._timeout, self._ids = restarts, timeout, itertools.count()
        self._start(time.monotonic() + start_timeout)

    def __call__(self, clips: Clips) -> FrameScores:
        deadline = time.monotonic() + OWN_SHARE * self._timeout
        header, pixels = packed(clips)
        self._memory.seek(0)
        self._memory.truncate()
        self._memory.write(pixels)
        self._memory.flush()
        while True:
            request = {"id": next(self._ids), "clips": header, "bytes": pixels.nbytes}
            try:
                self._socket.sendall(json.dumps(request).encode() + b"\n")
                reply = self._receive(deadline)
                break
            except ConnectionError as error:
                if not self._restarts:
                    raise
                self._restart(error, deadline)
        if reply.get("id") != request["id"]:
            raise MalformedMessage(f"the worker answered request {reply.get('id')!r}, not {request['id']}")
        if "error" in reply:
            raise RuntimeError(f"in the worker: {reply['error']}")
        return scores_of(reply)

    def _start(self, deadline: float) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                self._command, stdin=theirs.fileno(), stdout=theirs.fileno(), env=self._environment,
                pass_fds=(self._memory.fileno(),), start_new_session=True,
            )  # fmt: skip
        self._end = weakref.finalize(self, end, self._process, self._socket)
        self._lines = self._socket.makefile("rb")
        try:
            self.describe_as(self._receive(deadline).get("hello"))
        except (OSError, MalformedMessage):
            self._end()
            raise

    def _restart(self, error: ConnectionError, deadline: float) -> None:
        """A new worker, which must score the same."""
        self._end()
        self._restarts -= 1
        said = f"reward worker {self.name}: {error}; started again, at most {self._restarts} more times in this run"
        print(said, file=sys.stderr, flush=True)
        before = self.version
        self._start(deadline)
        if self.version != before:
            raise MalformedMessage(f"the worker came back with version {self.version!r}; it was {before!r}")

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The worker's next line.

        Raises:
            ConnectionError: it has ended.
            TimeoutError: it has sent nothing by the deadline (on the clock of time.monotonic).
            MalformedMessage: its line is no JSON object; shows where it begins.
        """
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            line = self._lines.readline(MAX_LINE)
        except TimeoutError:
            raise TimeoutError("the worker has not answered in time") from None
        if not line:
            code = self._process.wait()
            raise ConnectionError(f"the worker ended with exit code {code}; its own output says why")
        with suppress(ValueError):
            if isinstance(message := json.loads(line), dict):
                return message
        raise MalformedMessage(
            f"the worker sent {line.rstrip()[:SHOWN].decode(errors='replace')!r}, which is no JSON object"
        )

    @property
    def pid(self) -> int:
        """Of the worker's process."""
        return self._process.pid

    def close(self) -> None:
        self._end()
        self._memory.close()


def end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()


def anonymous_file() -> IO[bytes]:
    """A file without a name, in memory where the system has such files: it goes with the processes that hold it."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("clips"), "w+b")
    return tempfile.TemporaryFile()
