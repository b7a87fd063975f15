"""Slow clients of the reward server: their deadlines, and which of them give way if memory or connections run out.

Nothing is reserved for what a client announces. Whoever has sent the least per second gives way, so that clients that
trickle or stay silent do not keep others out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from h11 import LocalProtocolError
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

CREDIT = 2**16  # bytes that every client counts as having sent from the beginning: one that just came is not slow


@dataclass(eq=False)
class Upload:
    """A request's body: what has arrived of it, and since when it does."""

    deadline: asyncio.Timeout
    body: bytearray = field(default_factory=bytearray)
    started: float = field(default_factory=time.monotonic)

    def speed(self) -> float:
        return (CREDIT + len(self.body)) / (time.monotonic() - self.started + 1e-6)


class Incomplete(Exception):
    """A body that came too slowly, gave way to others, or whose client left: the number of bytes that arrived."""


class Uploads:
    """The bodies in memory, which are at most `limit` bytes together.

    A body has `patience` seconds, and one more for every `pace` bytes that have arrived; it may be silent for
    `patience` seconds. If memory runs out, the slowest of the arriving ones is dropped.
    """

    def __init__(self, limit: int, patience: float, pace: int) -> None:
        self.held = 0
        self._limit, self._patience, self._pace = limit, patience, pace
        self._arriving: set[Upload] = set()

    @asynccontextmanager
    async def received(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytearray]:
        """A complete body, which is held during the block.

        Raises:
            Incomplete: it did not arrive.
        """
        upload, size = Upload(asyncio.timeout(self._patience)), 0
        self._arriving.add(upload)
        try:
            async with upload.deadline:
                async for chunk in chunks:
                    size += len(chunk)
                    self._take(upload, chunk)
            self._arriving.remove(upload)
            yield upload.body
        except (TimeoutError, ClientDisconnect):
            raise Incomplete(size) from None
        finally:
            self._drop(upload)

    def _take(self, upload: Upload, chunk: bytes) -> None:
        if upload not in self._arriving:
            raise TimeoutError("it gave way to others")
        upload.body += chunk
        self.held += len(chunk)
        elapsed = time.monotonic() - upload.started
        left = min(self._patience, self._patience + len(upload.body) / self._pace - elapsed)
        upload.deadline.reschedule(asyncio.get_running_loop().time() + left)
        while self.held > self._limit:
            slowest = min((one for one in self._arriving if one.body), key=Upload.speed)
            self._drop(slowest)
            slowest.deadline.reschedule(0.0)

    def _drop(self, upload: Upload) -> None:
        self.held -= len(upload.body)
        upload.body = bytearray()  # not emptied: a request that is scored may still read it
        self._arriving.discard(upload)


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol with deadlines, and with room for new connections.

    A request's head must be complete `timeout_keep_alive` seconds after the connection was made or the head began, and
    a client must take its reply within that time. Above `limit_concurrency - 1` connections the slowest one is closed
    that does not wait for an answer to a complete request.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begun: float | None = self.loop.time()
        self._arrived, self._since = CREDIT, self.loop.time()
        self._unread: asyncio.TimerHandle | None = None
        self._watch()
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            others = [one for one in self.connections if isinstance(one, ImpatientProtocol) and one.gives_way()]
            if slowest := min((one for one in others if one is not self), key=ImpatientProtocol.speed, default=None):
                slowest.transport.abort()
                self.connections.discard(slowest)  # already now: others may be made before the loop tells it

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def gives_way(self) -> bool:
        """Whether it neither waits for a reply to a complete request nor is closed already."""
        waits = self.cycle is not None and not (self.cycle.more_body or self.cycle.response_started)
        return not waits and not self.transport.is_closing()

    def speed(self) -> float:
        return self._arrived / (self.loop.time() - self._since + 1e-6)

    def data_received(self, data: bytes) -> None:
        self._begun = self._begun or self.loop.time()
        self._arrived += len(data)
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        self._begun = None
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # closing would wait for a client that does not read

    def shutdown(self) -> None:
        """Complete requests are answered; one that is still arriving is not waited for."""
        if self.cycle is not None and self.cycle.more_body:
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None:  # the request that the malformed part belongs to gets no other reply
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        try:
            super().send_400_response(msg)
        except LocalProtocolError:  # a reply has begun
            self.transport.abort()

    def _watch(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._unset_keepalive_if_required()
            due = (self._begun or self.loop.time()) + self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_at(due, self.timeout_keep_alive_handler)
