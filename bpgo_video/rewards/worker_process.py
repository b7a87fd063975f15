"""How is a worker started, asked and ended? A child process that answers each line of JSON with one."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from bpgo_video.rewards.wire import MalformedMessage

LONGEST_LINE = 64 * 2**20  # bytes of one reply
SHOWN = 200  # characters of what was no reply


class WorkerProcess:
    """A worker, in a process group of its own: signals to the run's group are the run's to answer.

    It ends with this object, and by itself where this process ends in another way.

    Args:
        descriptors: file descriptors that it inherits.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int]):
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(environment),
            pass_fds=tuple(descriptors), start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._heard = bytearray()
        self.end = weakref.finalize(self, _end, self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, message: Mapping[str, Any]) -> None:
        """Raises ConnectionError where it has ended."""
        self._stdin.write(json.dumps(message).encode() + b"\n")
        self._stdin.flush()

    def hear(self, deadline: float) -> dict[str, Any]:
        """Its next line.

        Args:
            deadline: on the clock of time.monotonic.

        Raises:
            ConnectionError: it has ended.
            TimeoutError: it has said nothing by the deadline.
            MalformedMessage: its line is no JSON object; shows where it begins.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            while b"\n" not in self._heard:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError("the worker has not answered in time")
                part = os.read(self._stdout.fileno(), 2**16)
                if not part:
                    code = self._process.wait()
                    raise ConnectionError(f"the worker ended with exit code {code}; its own output says why")
                self._heard += part
                if len(self._heard) > LONGEST_LINE:
                    raise MalformedMessage(f"the worker's reply is longer than {LONGEST_LINE} bytes")
        line, _, self._heard = self._heard.partition(b"\n")
        return _object(line.decode(errors="replace"))


def _object(line: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except json.JSONDecodeError:
        message = None
    if not isinstance(message, dict):
        raise MalformedMessage(f"the worker said {line[:SHOWN]!r}, which is no JSON object")
    return message


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what it was told last, and never read
                pipe.close()
