"""HTTP client of a reward model on another machine (bpgo-video reward-server).

A request has an id, under which the server scores once and keeps the scores: sending it again, after a lost connection
or an error, changes nothing but the time that it takes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import ssl
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx2
import torch

from bpgo_video.rewards.base import Clips, FrameScores
from bpgo_video.rewards.wire import OWN_SHARE, DescribedModel, MalformedMessage, Packed, packed, scores_of

FIRST_PAUSE, MAX_PAUSE = 0.1, 10.0  # seconds between two tries; doubled each time, with jitter
URL = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/\S*)?")
TRY_AGAIN = {429, 502, 503, 504}
PIECE = 2**20  # bytes of pixels that are sent at a time
MAX_REPLY = 64 * 2**20  # bytes
REASON_SHOWN = 500  # characters


class Transient(Exception):
    """A failure that repeating the request may cure: its reason, and the server's Retry-After in seconds."""


class RemoteReward(DescribedModel):
    """A reward model behind HTTP.

    Args:
        url: of the server, `http://node7:8011` or https.
        token_env: environment variable that holds the server's token.
        videos_per_request: None sends a chunk at once. Requests are sent one after another.
        start_timeout: seconds to wait for the server when the run begins.
        patience: seconds of silence after which a request is sent again.
        timeout: seconds that a call may take, with all repetitions.

    Raises:
        ValueError: a url or a token that cannot be used.
        OSError: the server did not answer in time, or refuses.
    """

    def __init__(
        self, url: str, token_env: str | None = None, videos_per_request: int | None = None,
        start_timeout: float = 60.0, patience: float = 120.0, timeout: float = 1500.0,
    ):  # fmt: skip
        if not URL.fullmatch(url):
            raise ValueError(f"url is {url!r}; it must be like http://host:port or https://host:port")
        if token_env is not None and not os.environ.get(token_env):
            raise ValueError(f"token_env names {token_env}, which is not set or empty in the environment of this rank")
        headers = {} if token_env is None else {"Authorization": f"Bearer {os.environ[token_env]}"}
        # No proxy of the environment: the server is the cluster's own. Certificates are those of the system.
        self._client = httpx2.Client(headers=headers, trust_env=False, verify=ssl.create_default_context())
        self._url, self._videos_per_request = url.rstrip("/"), videos_per_request
        self._patience, self._timeout = patience, timeout
        self._jitter = random.Random(uuid.uuid4().int)  # no generator of the run's: only pauses depend on it
        reply = self._request("GET", "/reward", {}, time.monotonic() + start_timeout)
        self.describe_as(reply)
        self._max_bytes = int(reply["max_bytes"])

    def __call__(self, clips: Clips) -> FrameScores:
        deadline = time.monotonic() + OWN_SHARE * self._timeout
        each = self._videos_per_request or len(clips)
        parts = [clips.select(slice(first, first + each)) for first in range(0, len(clips), each)]
        found = [self._score(part, deadline) for part in parts]
        if len({scores.values.shape[1] for scores in found}) > 1:
            raise MalformedMessage("the server's replies to one chunk differ in the number of scored frames")
        return FrameScores(torch.cat([scores.values for scores in found]), found[0].times)

    def _score(self, clips: Clips, deadline: float) -> FrameScores:
        body = packed(clips)
        size = len(json.dumps(body.header)) + 1 + body.pixels.nbytes
        if size > self._max_bytes:
            fix = "set options.videos_per_request, or raise the server's --max-megabytes"
            raise ValueError(f"{len(clips)} videos are {size} bytes, and {self._url} takes {self._max_bytes}: {fix}")
        headers = {"X-Request-Id": uuid.uuid4().hex, "Content-Length": str(size)}
        reply = self._request("POST", "/score", headers, deadline, body)
        now = f"{reply.get('version')}-8bit"
        if now != self.version:
            raise MalformedMessage(f"{self._url} now serves version {now}; the run began with {self.version}")
        return scores_of(reply)

    def _request(
        self, method: str, path: str, headers: dict[str, str], deadline: float, body: Packed | None = None
    ) -> dict[str, Any]:
        """The reply to a request, which is repeated until the deadline.

        Raises:
            TimeoutError: no try succeeded; states the last one's reason.
            ConnectionError: the server refuses the request for good.
        """
        tries, pause = 0, FIRST_PAUSE
        while True:
            content = None if body is None else pieces(body)
            try:
                request = self._client.build_request(method, self._url + path, headers=headers, content=content)
                return self._try(request, deadline)
            except Transient as failure:
                reason, retry_after = failure.args
                tries, wait = tries + 1, max(retry_after, pause * self._jitter.uniform(0.5, 1.0))
                if time.monotonic() + wait >= deadline:
                    raise TimeoutError(f"{self._url}{path} failed {tries} times; the last time: {reason}") from failure
                time.sleep(wait)
                pause = min(2 * pause, MAX_PAUSE)

    def _try(self, request: httpx2.Request, deadline: float) -> dict[str, Any]:
        seconds = max(0.001, min(self._patience, deadline - time.monotonic()))
        request.extensions["timeout"] = httpx2.Timeout(seconds).as_dict()
        try:
            response = self._client.send(request, stream=True)
            with closing(response):
                text = b"".join(itertools.islice(response.iter_bytes(PIECE), MAX_REPLY // PIECE))
        except httpx2.RequestError as error:
            raise Transient(f"{type(error).__name__}: {error}", 0.0) from error
        status, said = response.status_code, text[:REASON_SHOWN].decode(errors="replace")
        if status in TRY_AGAIN:
            retry_after = response.headers.get("Retry-After", "")  # seconds, or a date, which is left to our own pauses
            raise Transient(f"status {status}: {said}", float(retry_after) if retry_after.isdecimal() else 0.0)
        if status != 200:
            raise ConnectionError(f"{request.url} refused with status {status}: {said}")
        try:
            reply = json.loads(text)
        except ValueError as error:
            raise Transient(f"a reply that is no JSON: {said}", 0.0) from error
        if not isinstance(reply, dict) or reply.get("id") != request.headers.get("X-Request-Id"):
            raise Transient(f"a reply to another request: {said}", 0.0)
        return reply


def pieces(body: Packed) -> Iterator[bytes]:
    """A request's body, piece by piece."""
    yield json.dumps(body.header).encode() + b"\n"
    for start in range(0, body.pixels.nbytes, PIECE):
        yield bytes(body.pixels[start : start + PIECE])
