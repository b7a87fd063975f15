"""How does a model score whose packages do not go with ours? In a process with an interpreter of its own.

The script that it runs imports `bpgo_video/worker_side/reward_worker.py`; docs/rewards.md shows one.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

import bpgo_video.worker_side
from bpgo_video.rewards.base import Clips, FrameScores
from bpgo_video.rewards.wire import Description, ElsewhereModel, MalformedMessage, packed, read_message, scores_of
from bpgo_video.rewards.worker_process import WorkerProcess

WORKER_SIDE = Path(bpgo_video.worker_side.__file__).parent
OWN_SHARE = 0.9  # of a call's timeout: the rest is for the message that says what was waited for


class WorkerReward(ElsewhereModel):
    """A reward model in a child process of this rank.

    Args:
        python: the interpreter, say `/opt/videoscore/bin/python`.
        script: what it runs.
        settings: keyword arguments of the model that the script serves.
        environment: variables beside those of this process.
        start_timeout: seconds until the worker has said what it is; it loads its model in them.
        restarts: how often in a run a worker that died is started again, and asked again.
        timeout: seconds that a call may take, restarts included.

    Raises:
        OSError: no such interpreter or script, or the worker ended, or was not ready in time.
        MalformedMessage: it says what no worker says.
    """

    def __init__(
        self,
        python: str,
        script: str,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        start_timeout: float = 600.0,
        restarts: int = 2,
        timeout: float = 1500.0,
        device: torch.device | str = "cpu",
    ):
        if not Path(script).is_file():
            raise FileNotFoundError(f"the worker's script {script!r} does not exist")
        self._memory = anonymous_file()
        descriptor = self._memory.fileno()
        arguments = {"memory": descriptor, "device": str(device), "settings": dict(settings or {})}
        self._command = [python, script, json.dumps(arguments)]
        paths = (str(WORKER_SIDE), os.environ.get("PYTHONPATH", "") if python == sys.executable else "")
        path = os.pathsep.join(filter(None, paths))  # our packages are not for another interpreter
        self._environment = {**os.environ, "PYTHONPATH": path, **(environment or {})}
        self._restarts, self._timeout, self._ids = restarts, timeout, itertools.count()
        self._process, description = self._started(time.monotonic() + start_timeout)
        self.describe_as(description)

    def __call__(self, clips: Clips) -> FrameScores:
        deadline = time.monotonic() + OWN_SHARE * self._timeout
        whole = packed(clips)
        self._memory.seek(0)
        self._memory.truncate()
        self._memory.write(whole.pixels)
        self._memory.flush()
        while True:
            question = {"id": next(self._ids), "clips": whole.header, "bytes": whole.pixels.nbytes}
            try:
                return self._answered(question, deadline)
            except ConnectionError as error:
                if not self._restarts:
                    raise
                self._restart(error, deadline)

    def _answered(self, question: Mapping[str, Any], deadline: float) -> FrameScores:
        self._process.tell(question)
        reply = self._process.hear(deadline)
        if reply.get("id") != question["id"]:
            raise MalformedMessage(f"the worker answered question {reply.get('id')!r}, not {question['id']}")
        if "error" in reply:
            raise RuntimeError(f"in the worker: {reply['error']}")
        return scores_of(reply)

    def _started(self, deadline: float) -> tuple[WorkerProcess, Description]:
        process = WorkerProcess(self._command, self._environment, (self._memory.fileno(),))
        try:
            return process, read_message(Description, process.hear(deadline).get("hello"))
        except (OSError, MalformedMessage):
            process.end()
            raise

    def _restart(self, error: ConnectionError, deadline: float) -> None:
        """A worker in place of the one that ended, which scores the same."""
        self._process.end()
        self._restarts -= 1
        print(
            f"reward worker {self.name}: {error}; started again, {self._restarts} more times in this run at most",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        before = self.version
        self._process, description = self._started(deadline)
        self.describe_as(description)
        if self.version != before:
            raise MalformedMessage(f"the worker came back with version {self.version!r}; it was {before!r}")

    @property
    def pid(self) -> int:
        """Of the worker's process."""
        return self._process.pid

    def close(self) -> None:
        self._process.end()
        self._memory.close()


def anonymous_file() -> IO[bytes]:
    """A file without a name, in memory where the system has such: it goes with the processes that hold it."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("clips"), "w+b")
    return tempfile.TemporaryFile()
