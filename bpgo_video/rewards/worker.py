"""Reward models in a child process with its own interpreter: `model: worker`, for packages that conflict with ours."""

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
from bpgo_video.errors import unknown
from bpgo_video.rewards.base import Clips, Device, FrameScores
from bpgo_video.rewards.wire import CALL_SHARE, MAX_REPLY, DescribedModel, MalformedMessage, pack_clips, unpack_scores

REPLY_SHOWN = 200  # characters of a malformed reply, in its message
WORKER_SIDE = Path(bpgo_video.__file__).parent / "worker_side"
WORKERS = Path(__file__).parent / "workers"


class WorkerReward(DescribedModel):
    """A reward model in a child process of this rank.

    The process runs a script that imports `bpgo_video/worker_side/reward_worker.py`; docs/rewards.md shows one. It
    answers each line of JSON with one line. It has its own process group, so that signals to the run's group do not
    reach it. It ends with this object or with this process.

    Args:
        python: the interpreter, for example `/opt/videoscore/bin/python`.
        script: what it runs: the name of a worker in `bpgo_video/rewards/workers/`, or a file.
        settings: keyword arguments of the model that the script serves.
        environment: variables in addition to those of this process.
        start_timeout: seconds until the worker has loaded and described its model.
        restarts: number of times per run that a dead worker is started again and receives the call again.
        timeout: seconds that a call may take, restarts included.

    Raises:
        OSError: no such interpreter or file, or the worker ended, or was not ready in time.
        ValueError: no worker has this name.
        MalformedMessage: its description is malformed.
    """

    def __init__(
        self, python: str, script: str, settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None, start_timeout: float = 600.0, restarts: int = 2,
        timeout: float = 1500.0, device: Device = "cpu",
    ):  # fmt: skip
        self._memory = anonymous_file()
        arguments = {"memory": self._memory.fileno(), "device": str(device), "settings": dict(settings or {})}
        self._command = [python, script_file(script), json.dumps(arguments)]
        ours = os.environ.get("PYTHONPATH") if python == sys.executable else None  # not for other interpreters
        path = os.pathsep.join(filter(None, (str(WORKER_SIDE), (environment or {}).get("PYTHONPATH", ours))))
        self._environment = {**os.environ, **(environment or {}), "PYTHONPATH": path}
        self._restarts, self._timeout, self._ids = restarts, timeout, itertools.count()
        self._start(time.monotonic() + start_timeout)

    def __call__(self, clips: Clips) -> FrameScores:
        deadline = time.monotonic() + CALL_SHARE * self._timeout
        header, pixels = pack_clips(clips)
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
        return unpack_scores(reply)

    def _start(self, deadline: float) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                self._command, stdin=theirs.fileno(), stdout=theirs.fileno(), env=self._environment,
                pass_fds=(self._memory.fileno(),), start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        self._end = weakref.finalize(self, end_worker, self._process, self._socket)
        self._lines = self._socket.makefile("rb")
        try:
            self.set_members(self._receive(deadline).get("hello"))
        except (OSError, MalformedMessage):
            self._end()
            raise

    def _restart(self, error: ConnectionError, deadline: float) -> None:
        """Starts a new worker, which must have the same version."""
        self._end()
        self._restarts -= 1
        left = f"started again, at most {self._restarts} more times in this run"
        print(f"reward worker {self.name}: {error}; {left}", file=sys.stderr, flush=True)
        version = self.version
        self._start(deadline)
        if self.version != version:
            raise MalformedMessage(f"the new worker has version {self.version!r}; the first had {version!r}")

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The worker's next line.

        Raises:
            ConnectionError: it has ended.
            TimeoutError: it has sent nothing by the deadline (on the clock of time.monotonic).
            MalformedMessage: its line is not a JSON object; shows its beginning.
        """
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            line = self._lines.readline(MAX_REPLY)
        except TimeoutError:
            raise TimeoutError("the worker has not answered in time") from None
        if not line:
            code = self._process.wait()
            raise ConnectionError(f"the worker ended with exit code {code}; see its own output for the reason")
        with suppress(ValueError, RecursionError):
            if isinstance(message := json.loads(line), dict):
                return message
        shown = line.rstrip()[:REPLY_SHOWN].decode(errors="replace")
        raise MalformedMessage(f"the worker sent {shown!r}, which is not a JSON object")

    def close(self) -> None:
        self._end()
        self._memory.close()


def script_file(script: str) -> str:
    """The file of a worker: of a shipped one by its name, else the path itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no worker has this name.
    """
    if os.sep in script or script.endswith(".py"):
        if not Path(script).is_file():
            raise FileNotFoundError(f"the worker's script {script!r} does not exist")
        return script
    shipped = sorted(path.stem for path in WORKERS.glob("*.py"))
    if script not in shipped:
        raise ValueError(unknown("script", script, shipped, ", or a file of your own, as workers/mine.py"))
    return str(WORKERS / f"{script}.py")


def end_worker(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    with suppress(ProcessLookupError):  # it has ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()


def anonymous_file() -> IO[bytes]:
    """A file without a name, in memory where the system supports it; it is freed with the processes that hold it."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("clips"), "w+b")
    return tempfile.TemporaryFile()
