"""How is a reward model served over HTTP? Few requests at once, of bounded size, each checked before it is believed.

    GET  /health   {"status": "ok"}, without a token
    GET  /reward   what is served: name, version, range ...
    POST /score    X-Request-Id; a line of JSON (`wire.ClipsHeader`), then pixels; {"id", "version", "values", "times"}

Refusals are {"error": reason} with status 400, 401, 404, 409, 411, 413, 429 (Retry-After), 500 or 503. Nothing is ever
unpickled, and no prompt is logged.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.rewards.service import OtherContent, RewardService
from bpgo_video.rewards.wire import MalformedMessage, received

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[0-9a-zA-Z-]{8,64}")
LONGEST_HEADER = 2**20  # bytes of the JSON line
DRAINED = 2**20  # bytes of a refused body that are read, so that a small one's sender sees the reply


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        waiting: requests that are read, wait or are scored; each holds its pixels.
        bytes: of one request.
        connections: open at once.
        patience: seconds that a request waits for its turn to be read, and that a connection may be silent.
    """

    waiting: int = 8
    bytes: int = 2**30
    connections: int = 256
    patience: float = 30.0


class Refused(Exception):
    """A request that gets a status and a reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def check_exposure(host: str, token: str | None) -> None:
    """Other machines are served with a token only.

    Raises:
        ConfigError: the host is not loopback, and there is no token.
    """
    is_address = host[:1].isdecimal() or ":" in host
    loopback = ipaddress.ip_address(host).is_loopback if is_address else host == "localhost"
    if not loopback and not token:
        raise ConfigError(
            f"host is {host!r}, which other machines can reach, and there is no token: name an environment variable "
            "that holds one with --token-env, or leave --host at 127.0.0.1"
        )


class RewardServer(ThreadingHTTPServer):
    """Listens from the start; `serve_forever` answers.

    Args:
        port: 0 takes a free one, see `server_address`.

    Raises:
        ConfigError: other machines could ask without a token.
        OSError: the port is taken.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, service: RewardService, host: str, port: int, token: str | None, limits: Limits):
        check_exposure(host, token)
        self.service, self.token, self.limits = service, token, limits
        self.turns = threading.BoundedSemaphore(limits.waiting)
        self._connections = threading.BoundedSemaphore(limits.connections)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._connections.acquire(blocking=False):
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.info("%s went away", client_address[0], exc_info=log.isEnabledFor(logging.DEBUG))


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    server: RewardServer

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.limits.patience)
        self.left = 0  # bytes of the body that are not read yet

    def do_GET(self) -> None:
        self._respond({"/health": self._health, "/reward": self._describe}.get(self.path, self._nothing))

    def do_POST(self) -> None:
        self._respond({"/score": self._score}.get(self.path, self._nothing))

    def _respond(self, answer: Any) -> None:
        began = time.monotonic()
        try:
            status, message = 200, answer()
        except Refused as refusal:
            status, message = refusal.status, {"error": str(refusal)}
            self.rfile.read(min(self.left, DRAINED))
        self._send(status, message)
        path = "an unknown path" if status == 404 else self.path
        log.info("%s %s %d in %.3f s", self.command, path, status, time.monotonic() - began)

    def _send(self, status: int, message: Mapping[str, Any]) -> None:
        text = json.dumps(message).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(text)

    def _nothing(self) -> dict[str, Any]:
        raise Refused(404, "there are GET /health, GET /reward and POST /score")

    def _health(self) -> dict[str, Any]:
        return {"status": "ok"}

    def _describe(self) -> dict[str, Any]:
        self._check_token()
        return {**self.server.service.description, "max_bytes": self.server.limits.bytes}

    def _score(self) -> dict[str, Any]:
        self._check_length()
        self._check_token()
        request_id = self.headers.get("X-Request-Id", "")
        if not REQUEST_ID.fullmatch(request_id):
            raise Refused(400, "X-Request-Id must be 8 to 64 letters, digits or hyphens")
        if not self.server.turns.acquire(timeout=self.server.limits.patience):
            raise Refused(429, f"{self.server.limits.waiting} requests are waiting; come again")
        try:
            return self._scored(request_id)
        finally:
            self.server.turns.release()

    def _scored(self, request_id: str) -> dict[str, Any]:
        service, body = self.server.service, self._body()
        line = bytes(body[:LONGEST_HEADER]).partition(b"\n")[0]
        try:
            asked = received(_json(line), memoryview(body)[len(line) + 1 :])
            job = service.submit(request_id, hashlib.sha256(body).digest(), asked)
        except MalformedMessage as error:
            raise Refused(400, str(error)) from error
        except OtherContent as error:
            raise Refused(409, str(error)) from error
        del body, asked  # the job drops them once scored
        job.done.wait()
        if job.error is not None:
            raise Refused(500, f"the model failed: {job.error}")
        return {"id": request_id, "version": service.description["version"], **(job.scores or {})}

    def _check_token(self) -> None:
        given = self.headers.get("Authorization", "").encode("latin-1")
        token = self.server.token
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Refused(401, "the Authorization header does not hold this server's token")

    def _check_length(self) -> None:
        stated, limit = self.headers.get("Content-Length", ""), self.server.limits.bytes
        if not stated.isdecimal():
            raise Refused(411, "Content-Length must state the size of the request")
        self.left = int(stated)
        if self.left > limit:
            raise Refused(413, f"the request has {stated} bytes; this server takes {limit}: send fewer videos at once")

    def _body(self) -> bytearray:
        body = bytearray(self.left)
        view, at = memoryview(body), 0
        while self.left:
            count = self.rfile.readinto1(view[at:])  # type: ignore[attr-defined]
            if not count:
                raise ConnectionError("the request ended early")
            at, self.left = at + count, self.left - count
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `_respond` logs, and the standard log would show what a client put into its request line."""


def _json(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        raise MalformedMessage(
            f"the request does not begin with a line of JSON within {LONGEST_HEADER} bytes"
        ) from None
