"""Reward models on other machines: `model: remote`, the HTTP client of bpgo-video reward-server."""

from __future__ import annotations

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

from bpgo_video.config.secrets import without_secrets
from bpgo_video.rewards.base import Clips, FrameScores
from bpgo_video.rewards.wire import (
    CALL_SHARE,
    MAX_REPLY,
    Capacity,
    DescribedModel,
    MalformedMessage,
    PackedClips,
    pack_clips,
    parse,
    unpack_scores,
)

FIRST_PAUSE, MAX_PAUSE = 0.1, 10.0  # seconds between two attempts; doubled each time, with jitter
URL = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/[^\s?#]*)?")
TRY_AGAIN = {408, 429, 502, 503, 504}
PIECE = 2**20  # bytes of pixels that are sent at a time
REASON_SHOWN = 500  # characters


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
