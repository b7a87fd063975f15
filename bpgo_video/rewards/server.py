"""HTTP server of one reward model: a bounded number of requests of bounded size, each scored once.

    GET  /health   {"status": "ok"}, without a token
    GET  /reward   the model's description (`wire.Description`) and `max_bytes` of a request
    POST /score    X-Request-Id; a line of JSON (`wire.ClipsHeader`), then pixels; id, version, `wire.ScoresMessage`

Errors are {"error": reason} with status 400, 401, 404, 408, 409, 411, 413, 429 (Retry-After) or 500; uvicorn answers
malformed HTTP with 400, and 503 if all connections wait for scores. Nothing is unpickled, and no prompt is logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.documents import MalformedFile, plain_json
from bpgo_video.rewards.base import RewardModel
from bpgo_video.rewards.connections import ImpatientProtocol, Incomplete, Uploads
from bpgo_video.rewards.score_ahead import scoring_stream
from bpgo_video.rewards.wire import MalformedMessage, PackedClips, check_clips, describe, pack_scores, unpack_clips

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[0-9a-zA-Z-]{8,64}")
MAX_HEADER = 2**20  # bytes of the JSON line
ONCE = ("Content-Length", "Authorization", "X-Request-Id")  # headers whose repetition has no one meaning


@dataclass(frozen=True)
class Limits:
    """A server's limits.

    Attributes:
        waiting: complete requests at once, from their arrival to the reply.
        bytes: of one request; all of them, arriving ones included, hold at most `waiting` times as many.
        connections: open at once.
        patience: seconds that the head of a request may take, that a client may be silent or leave a reply unread,
            and that a complete request waits for its turn.
        pace: bytes per second at which a body must arrive after its first `patience` seconds.
    """

    waiting: int = 8
    bytes: int = 2**30
    connections: int = 256
    patience: float = 30.0
    pace: int = 2**20


class Refused(Exception):
    """A request that gets an error: the status, and the reason."""


class Job(NamedTuple):
    """A request: the digest of its content, when it was submitted, and its future reply."""

    digest: bytes
    submitted: float
    reply: Future[dict[str, Any]]


class RewardService:
    """Scores each request id once, however often it is sent, and keeps the scores.

    One thread scores one request at a time, in order. Requests are not merged into batches: scores could then depend,
    in their last bits, on other clients.

    Args:
        device: of the model.
        kept: number of finished requests whose scores are kept.
        keep_seconds: how long they are kept at most.
    """

    def __init__(self, model: RewardModel, device: torch.device, kept: int = 4096, keep_seconds: float = 3600.0):
        self.description = describe(model)
        self.scored = 0
        self._model, self._device, self._kept, self._keep_seconds = model, device, kept, keep_seconds
        self._jobs: dict[str, Job] = {}
        self._thread = ThreadPoolExecutor(1, "scoring", torch.set_num_threads, (torch.get_num_threads(),))

    def submit(self, request_id: str, digest: bytes, clips: PackedClips) -> Future[dict[str, Any]]:
        """The future reply to a request, which is queued if its id is new. Not thread-safe.

        Raises:
            Refused: the id was used for another request.
        """
        finished, now = [known for known, job in self._jobs.items() if job.reply.done()], time.monotonic()
        for number, known in enumerate(finished):
            if number < len(finished) - self._kept or self._jobs[known].submitted < now - self._keep_seconds:
                del self._jobs[known]
        if request_id not in self._jobs:
            self._jobs[request_id] = Job(digest, now, self._thread.submit(self._score, clips))
        job = self._jobs[request_id]
        if job.digest != digest:
            raise Refused(409, f"the id {request_id} was used for another request; every request needs its own")
        return job.reply

    def close(self) -> None:
        """Returns once all queued requests are scored."""
        self._thread.shutdown()

    @torch.no_grad()
    def _score(self, clips: PackedClips) -> dict[str, Any]:
        self.scored += 1
        try:
            with scoring_stream(self._device):
                return pack_scores(self._model(unpack_clips(clips)))
        except Exception as error:  # reported to the client of this request; the next request is scored
            log.error("the model failed with %s", type(error).__name__)
            log.debug("its traceback", exc_info=True)
            return {"error": f"the model failed: {type(error).__name__}: {error}"}


def check_exposure(host: str, token: str | None) -> None:
    """
    Raises:
        ConfigError: the host is not loopback, and there is no token.
    """
    is_address = host[:1].isdecimal() or ":" in host
    loopback = ipaddress.ip_address(host).is_loopback if is_address else host == "localhost"
    if not loopback and not token:
        fix = "name an environment variable that holds one with --token-env, or leave --host at 127.0.0.1"
        raise ConfigError(f"host is {host!r}, which other machines can reach, and there is no token: {fix}")


class RewardServer:
    """An ASGI application that listens from its construction on; `serve_forever` answers.

    Args:
        port: 0 takes a free one, see `server_address`.

    Raises:
        ConfigError: other machines could connect without a token.
        OSError: the port is taken.
    """

    def __init__(self, service: RewardService, host: str, port: int, token: str | None, limits: Limits):
        check_exposure(host, token)
        self.service, self.token, self.limits = service, token, limits
        self.turns = asyncio.Semaphore(limits.waiting)
        self.uploads = Uploads(limits.waiting * limits.bytes, limits.patience, limits.pace)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.create_server((host, port), family=family, backlog=limits.connections)
        self.server_address: tuple[Any, ...] = self.socket.getsockname()
        self._server = uvicorn.Server(
            uvicorn.Config(
                self, http=ImpatientProtocol, ws="none", lifespan="off", access_log=False, log_config=None,
                log_level="warning", backlog=limits.connections, limit_concurrency=limits.connections + 1,
                timeout_keep_alive=limits.patience,  # type: ignore[arg-type]
            )
        )  # fmt: skip

    def __enter__(self) -> RewardServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def serve_forever(self) -> None:
        """Answers until `shutdown`, SIGTERM or Ctrl-C, and first completes the requests that were read."""
        self._server.run(sockets=[self.socket])

    def shutdown(self) -> None:
        """Makes `serve_forever` return, in another thread."""
        self._server.should_exit = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, started = Request(scope, receive), time.monotonic()
        try:
            status, message = 200, await self._answer(request)
        except Refused as refusal:
            status, message = refusal.args[0], {"error": refusal.args[1]}
        path = "an unknown path" if status == 404 else scope["path"]
        log.info("%s %s %d in %.3f s", request.method, path, status, time.monotonic() - started)
        headers = {"Retry-After": "1"} if status == 429 else {}
        await Response(json.dumps(message), status, headers, "application/json")(scope, receive, send)

    async def _answer(self, request: Request) -> dict[str, Any]:
        if not (version := request.scope["http_version"]).startswith("1."):
            raise Refused(400, f"the request states HTTP/{version}; this server speaks HTTP/1.1")
        match request.method, request.scope["path"]:  # request.url would raise for some Host headers
            case "GET", "/health":
                return {"status": "ok"}
            case "GET", "/reward":
                self._check_token(request)
                return {**self.service.description, "max_bytes": self.limits.bytes}
            case "POST", "/score":
                return await self._score(request)
        raise Refused(404, "there are GET /health, GET /reward and POST /score")

    def _check_token(self, request: Request) -> None:
        sent = request.headers.get("Authorization", "").encode("latin-1")
        if self.token is not None and not hmac.compare_digest(sent, f"Bearer {self.token}".encode()):
            raise Refused(401, "the Authorization header does not hold this server's token")

    async def _score(self, request: Request) -> dict[str, Any]:
        request_id, size = self._check_head(request)
        try:
            async with self.uploads.received(request.stream()) as body:
                reply = await self._scored(request_id, body)
        except Incomplete as error:
            raise Refused(408, f"{error.args[0]} of {size} bytes arrived") from None
        if "error" in reply:
            raise Refused(500, reply["error"])
        return {"id": request_id, "version": self.service.description["version"], **reply}

    def _check_head(self, request: Request) -> tuple[str, int]:
        """The request's id, and the size of its body."""
        for name in ONCE:
            if len(request.headers.getlist(name)) > 1:
                raise Refused(400, f"the header {name} is sent twice")
        length, limit = request.headers.get("Content-Length", ""), self.limits.bytes
        if not length.isdecimal() or "Transfer-Encoding" in request.headers:
            raise Refused(411, "Content-Length must state the size of the request, without a Transfer-Encoding")
        if int(length) > limit:
            raise Refused(413, f"the request has {length} bytes; this server takes {limit}: send fewer videos at once")
        self._check_token(request)
        request_id = request.headers.get("X-Request-Id", "")
        if not REQUEST_ID.fullmatch(request_id):
            raise Refused(400, "X-Request-Id must be 8 to 64 letters, digits or hyphens")
        return request_id, int(length)

    async def _scored(self, request_id: str, body: bytearray) -> dict[str, Any]:
        """The reply to a complete request, in its turn."""
        try:
            await asyncio.wait_for(self.turns.acquire(), self.limits.patience)
        except TimeoutError:
            raise Refused(429, f"{self.limits.waiting} requests are waiting; try again later") from None
        try:
            digest, clips = await asyncio.to_thread(parse_body, body)
            return await asyncio.wrap_future(self.service.submit(request_id, digest, clips))
        except MalformedMessage as error:
            raise Refused(400, str(error)) from None
        finally:
            self.turns.release()


def parse_body(body: bytearray) -> tuple[bytes, PackedClips]:
    """Digest and validated content of a request."""
    line = bytes(body[:MAX_HEADER]).partition(b"\n")[0]
    try:
        header = plain_json(line, "it")
    except MalformedFile as error:
        rule = f"the request does not begin with a line of JSON within {MAX_HEADER} bytes"
        raise MalformedMessage(f"{rule}: {error}") from None
    return hashlib.sha256(body).digest(), check_clips(header, memoryview(body)[len(line) + 1 :])
