"""How does a model score that another machine serves (bpgo-video reward-server)? By requests that may be sent again.

A request has an id, under which the server scores once and keeps the scores: sending it again, after a lost connection
or a refusal, changes nothing but the time that it takes.
"""

from __future__ import annotations

import json
import os
import random
import time
import uuid
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import torch

from bpgo_video.rewards.base import Clips, FrameScores
from bpgo_video.rewards.wire import Description, ElsewhereModel, MalformedMessage, packed, read_message, scores_of

OWN_SHARE = 0.9  # of a call's timeout: the rest is for the message that says what was waited for
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between two tries; doubled each time, with jitter
TRY_AGAIN = {429, 502, 503, 504}
SCHEMES = {"http": HTTPConnection, "https": HTTPSConnection}
LONGEST_REPLY = 64 * 2**20  # bytes
REASON_SHOWN = 500  # characters


class ForNow(Exception):
    """A try that failed and may succeed when repeated; `pause` is what the server asks for, in seconds."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class RemoteReward(ElsewhereModel):
    """A reward model behind HTTP.

    Args:
        url: of the server, `http://node7:8011` or https.
        token_env: environment variable that holds the server's token.
        videos_per_request: None sends a chunk at once. Requests follow one another.
        start_timeout: seconds to wait for the server when the run begins.
        patience: seconds of silence after which a request is sent again.
        timeout: seconds that a call may take, with all repetitions.

    Raises:
        ValueError: a url or a token that cannot be used.
        OSError: the server did not answer in time, or refuses.
    """

    def __init__(
        self,
        url: str,
        token_env: str | None = None,
        videos_per_request: int | None = None,
        start_timeout: float = 60.0,
        patience: float = 120.0,
        timeout: float = 1500.0,
    ):
        self._place = urlsplit(url)
        if self._place.scheme not in SCHEMES or not self._place.hostname:
            raise ValueError(f"url is {url!r}; it must be like http://host:port or https://host:port")
        if token_env is not None and not os.environ.get(token_env):
            raise ValueError(f"token_env names {token_env}, which is not set or empty in the environment of this rank")
        self._token = os.environ[token_env] if token_env is not None else None
        self._url, self._videos_per_request = url, videos_per_request
        self._patience, self._timeout = patience, timeout
        self._jitter = random.Random(uuid.uuid4().int)  # no generator of the run's: only pauses depend on it
        said = self._insist("GET", "/reward", (), {}, time.monotonic() + start_timeout)
        self.describe_as(read_message(Description, said))
        self._max_bytes = int(said["max_bytes"])

    def __call__(self, clips: Clips) -> FrameScores:
        deadline = time.monotonic() + OWN_SHARE * self._timeout
        each = self._videos_per_request or len(clips)
        found = [self._scored(part, deadline) for part in parts_of(clips, each)]
        if any(scores.values.shape[1] != found[0].values.shape[1] for scores in found):
            raise MalformedMessage("the server's replies to one chunk differ in the number of scored frames")
        return FrameScores(torch.cat([scores.values for scores in found]), found[0].times)

    def _scored(self, clips: Clips, deadline: float) -> FrameScores:
        whole = packed(clips)
        header = json.dumps(whole.header).encode() + b"\n"
        size = len(header) + whole.pixels.nbytes
        if size > self._max_bytes:
            raise ValueError(
                f"{len(clips)} videos are {size} bytes, and {self._url} takes {self._max_bytes} in a request: set "
                "options.videos_per_request, or raise the server's --max-megabytes"
            )
        headers = {"X-Request-Id": uuid.uuid4().hex, "Content-Length": str(size)}
        reply = self._insist("POST", "/score", (header, whole.pixels), headers, deadline)
        now = f"{reply.get('version')}-8bit"
        if now != self.version:
            raise MalformedMessage(f"{self._url} now serves version {now}; the run began with {self.version}")
        return scores_of(reply)

    def _insist(
        self, method: str, path: str, body: Sequence[bytes | memoryview], headers: dict[str, str], deadline: float
    ) -> dict[str, Any]:
        """The reply to a request, which is repeated until the deadline.

        Raises:
            TimeoutError: no try succeeded; tells the last one's reason.
            ConnectionError: the server refuses the request for good.
        """
        pause, tries = FIRST_PAUSE, 0
        while True:
            try:
                return self._once(method, path, body, headers, deadline - time.monotonic())
            except ForNow as reason:
                tries += 1
                pause_now = max(reason.pause, pause * self._jitter.uniform(0.5, 1.0))
                if time.monotonic() + pause_now >= deadline:
                    raise TimeoutError(f"{self._url}{path} failed {tries} times; the last time: {reason}") from reason
                time.sleep(pause_now)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _once(
        self, method: str, path: str, body: Sequence[bytes | memoryview], headers: dict[str, str], seconds: float
    ) -> dict[str, Any]:
        place = self._place
        patience = max(0.001, min(self._patience, seconds))
        connection = SCHEMES[place.scheme](str(place.hostname), place.port, timeout=patience)
        token = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        try:
            connection.request(method, place.path.rstrip("/") + path, iter(body), {**headers, **token})
            response = connection.getresponse()
            text = response.read(LONGEST_REPLY)
        except (OSError, HTTPException) as error:
            raise ForNow(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if response.status in TRY_AGAIN:
            raise ForNow(f"status {response.status}: {shown(text)}", seconds_of(response.getheader("Retry-After")))
        if response.status != 200:
            raise ConnectionError(f"{self._url}{path} refused with status {response.status}: {shown(text)}")
        return reply_of(text, headers.get("X-Request-Id"))


def reply_of(text: bytes, request_id: str | None) -> dict[str, Any]:
    """A reply's JSON object; anything else is a reply that was damaged on its way."""
    try:
        reply = json.loads(text)
    except ValueError as error:
        raise ForNow(f"a reply that is no JSON: {shown(text)}") from error
    if not isinstance(reply, dict) or reply.get("id") != request_id:
        raise ForNow(f"a reply to another request: {shown(text)}")
    return reply


def parts_of(clips: Clips, each: int) -> list[Clips]:
    """Runs of `each` videos; the last may be shorter."""
    runs = [slice(first, first + each) for first in range(0, len(clips), each)]
    images = clips.images
    return [
        Clips(clips.videos[run], clips.fps, clips.texts[run], None if images is None else images[run]) for run in runs
    ]


def seconds_of(retry_after: str | None) -> float:
    """A Retry-After in seconds; the header may also hold a date, which is then left to the own pauses."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0


def shown(text: bytes) -> str:
    return text[:REASON_SHOWN].decode(errors="replace")
