"""Reward models in other processes: a child process with an interpreter of its own, and an HTTP client.

`model: worker` is for packages that conflict with ours, `model: remote` for other machines (bpgo-video reward-server).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any

import httpx2
import torch

import bpgo_video
from bpgo_video.config.secrets import without_secrets
from bpgo_video.rewards.base import Clips, Device, FrameScores
from bpgo_video.rewards.wire import (
    Capacity,
    DescribedModel,
    MalformedMessage,
    PackedClips,
    pack_clips,
    parse,
    unpack_scores,
)

CALL_SHARE = 0.9  # of a call's timeout that the other process may use: the rest is for reporting the error
MAX_REPLY = 64 * 2**20  # bytes
REPLY_SHOWN = 200  # characters of a malformed reply, in its message
WORKER_SIDE = Path(bpgo_video.__file__).parent / "worker_side"

FIRST_PAUSE, MAX_PAUSE = 0.1, 10.0  # seconds between two attempts; doubled each time, with jitter
URL = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/[^\s?#]*)?")
TRY_AGAIN = {408, 429, 502, 503, 504}
PIECE = 2**20  # bytes of pixels that are sent at a time
REASON_SHOWN = 500  # characters


class WorkerReward(DescribedModel):
    """A reward model in a child process of this rank.

    The process runs a script that imports `bpgo_video/worker_side/reward_worker.py`; docs/rewards.md shows one. It
    answers each line of JSON with one line. It has its own process group, so that signals to the run's group do not
    reach it. It ends with this object or with this process.

    Args:
        python: the interpreter, for example `/opt/videoscore/bin/python`.
        script: what it runs.
        settings: keyword arguments of the model that the script serves.
        environment: variables in addition to those of this process.
        start_timeout: seconds until the worker has loaded and described its model.
        restarts: number of times per run that a dead worker is started again and receives the call again.
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
        ours = os.environ.get("PYTHONPATH", "") if python == sys.executable else ""  # not for other interpreters
        path = os.pathsep.join(filter(None, (str(WORKER_SIDE), ours)))
        self._environment = {**os.environ, "PYTHONPATH": path, **(environment or {})}
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


class Transient(Exception):
    """A failure that another attempt may not have: its reason, and the server's Retry-After in seconds."""


class RemoteReward(DescribedModel):
    """A reward model behind HTTP.

    Every request has an id. The server scores an id once and keeps the scores, so a repeated request returns the same.

    Args:
        url: of the server, `http://node7:8011` or https.
        token_env: environment variable with the server's token.
        videos_per_request: None sends a whole chunk. Requests are sent one after another.
        start_timeout: seconds to wait for the server when the run begins.
        patience: seconds without an answer after which a request is sent again.
        timeout: seconds that a call may take, with all repetitions.

    Raises:
        ValueError: a malformed url, or a missing token.
        OSError: the server did not answer in time, or refuses.
    """

    def __init__(
        self, url: str, token_env: str | None = None, videos_per_request: int | None = None,
        start_timeout: float = 60.0, patience: float = 120.0, timeout: float = 1500.0,
    ):  # fmt: skip
        if not URL.fullmatch(url):
            rule = "it must be like http://host:port or https://host:port, with a token in the variable of token_env"
            raise ValueError(f"url is {without_secrets(url)!r}; {rule}")
        if token_env is not None and not os.environ.get(token_env):
            raise ValueError(f"token_env names {token_env}, which is not set or empty in the environment of this rank")
        headers = {"Accept-Encoding": "identity"}
        if token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        # No proxy from the environment: the server is the cluster's own. Certificates are those of the system.
        self._client = httpx2.Client(headers=headers, trust_env=False, verify=ssl.create_default_context())
        self._url, self._videos_per_request = url.rstrip("/"), videos_per_request
        self._patience, self._timeout = patience, timeout
        self._jitter = random.Random(uuid.uuid4().int)  # pauses do not draw from the run's generators
        reply = self._request("GET", "/reward", {}, time.monotonic() + start_timeout)
        self.set_members(reply)
        self._max_bytes = parse(Capacity, reply).max_bytes

    def __call__(self, clips: Clips) -> FrameScores:
        deadline = time.monotonic() + CALL_SHARE * self._timeout
        size = self._videos_per_request or len(clips)
        parts = [clips.select(slice(first, first + size)) for first in range(0, len(clips), size)]
        scores = [self._score(part, deadline) for part in parts]
        if len({part.values.shape[1] for part in scores}) > 1:
            raise MalformedMessage("the server's replies to one chunk differ in the number of scored frames")
        stds = [part.std for part in scores if part.std is not None]
        if len(stds) not in (0, len(scores)):
            raise MalformedMessage("some of the server's replies to one chunk state a std, and some do not")
        return FrameScores(
            torch.cat([part.values for part in scores]), scores[0].times, torch.cat(stds) if stds else None
        )

    def _score(self, clips: Clips, deadline: float) -> FrameScores:
        packed = pack_clips(clips)
        size = len(json.dumps(packed.header)) + 1 + packed.pixels.nbytes
        if size > self._max_bytes:
            fix = "set options.videos_per_request, or raise the server's --max-megabytes"
            raise ValueError(f"{len(clips)} videos are {size} bytes, and {self._url} takes {self._max_bytes}: {fix}")
        headers = {"X-Request-Id": uuid.uuid4().hex, "Content-Length": str(size)}
        reply = self._request("POST", "/score", headers, deadline, packed)
        now = f"{reply.get('version')}-8bit"
        if now != self.version:
            raise MalformedMessage(f"{self._url} now serves version {now}; the run began with {self.version}")
        return unpack_scores(reply)

    def _request(
        self, method: str, path: str, headers: dict[str, str], deadline: float, packed: PackedClips | None = None
    ) -> dict[str, Any]:
        """The reply to a request, which is repeated until the deadline.

        Raises:
            TimeoutError: every attempt failed; states the last one's reason.
            ConnectionError: the server refuses the request.
        """
        attempts, pause = 0, FIRST_PAUSE
        while True:
            content = None if packed is None else body_of(packed)
            request = self._client.build_request(method, self._url + path, headers=headers, content=content)
            try:
                return self._try(request, deadline)
            except Transient as failure:
                reason, retry_after = failure.args
                attempts, wait = attempts + 1, max(retry_after, pause * self._jitter.uniform(0.5, 1.0))
                if time.monotonic() + wait >= deadline:
                    late = f"{self._url}{path} failed {attempts} times; the last time: {reason}"
                    raise TimeoutError(late) from failure
                time.sleep(wait)
                pause = min(2 * pause, MAX_PAUSE)

    def _try(self, request: httpx2.Request, deadline: float) -> dict[str, Any]:
        seconds = max(0.001, min(self._patience, deadline - time.monotonic()))
        request.extensions["timeout"] = httpx2.Timeout(seconds).as_dict()
        content = bytearray()
        try:
            with closing(response := self._client.send(request, stream=True)):
                if encoding := response.headers.get("Content-Encoding"):  # it could expand without bounds
                    raise Transient(f"a reply that is compressed by {encoding[:20]!r}", 0.0)
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > MAX_REPLY or time.monotonic() > deadline:
                        raise Transient(f"a reply over {MAX_REPLY} bytes, or one that does not end", 0.0)
        except httpx2.RequestError as error:
            raise Transient(f"{type(error).__name__}: {error}", 0.0) from error
        status, shown = response.status_code, content[:REASON_SHOWN].decode(errors="replace")
        if status in TRY_AGAIN:
            retry_after = response.headers.get("Retry-After", "")  # seconds; a date is ignored
            raise Transient(f"status {status}: {shown}", float(retry_after) if retry_after.isdecimal() else 0.0)
        if status != 200:
            raise ConnectionError(f"{request.url} refused with status {status}: {shown}")
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Transient(f"a reply that is not JSON: {shown}", 0.0) from error
        if not isinstance(reply, dict) or reply.get("id") != request.headers.get("X-Request-Id"):
            raise Transient(f"a reply to another request: {shown}", 0.0)
        return reply


def body_of(packed: PackedClips) -> Iterator[bytes]:
    """A request's body, in pieces."""
    yield json.dumps(packed.header).encode() + b"\n"
    for start in range(0, packed.pixels.nbytes, PIECE):
        yield bytes(packed.pixels[start : start + PIECE])
