"""The HTTP reward server: each request is scored exactly once, for clients with the token."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.rewards import Clips, FrameSampling, FrameScores, RewardModel
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.remote import RemoteReward
from bpgo_video.rewards.server import Limits, Refused, RewardServer, RewardService, check_exposure
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rewards.wire import MalformedMessage, check_clips, pack_clips, pack_scores, unpack_clips, unpack_scores
from tests.made.recipes import ROOT, python_path
from tests.rewards.toys import CPU, PROMPTS, Breaking, Brightness, Darkness, chunks_of


@contextmanager
def served(
    model: RewardModel, token: str | None = None, limits: Limits | None = None, port: int = 0
) -> Iterator[RewardServer]:
    service = RewardService(model, CPU)
    with RewardServer(service, "127.0.0.1", port, token, limits or Limits()) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            service.close()


class Waiting(Brightness):
    """Scores once `may_score` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_score = threading.Event()

    def __call__(self, clips: Clips) -> FrameScores:
        assert self.may_score.wait(30)
        return super().__call__(clips)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def url_of(server: RewardServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def clips_of(text: str, samples: int = 2) -> Clips:
    generator = torch.Generator().manual_seed(len(text) * 100 + samples)
    texts = tuple(text if i == 0 else f"{text}, video {i}" for i in range(samples))
    return Clips(torch.rand(samples, 3, 3, 8, 6, generator=generator), 8.0, texts)


def expected(clips: Clips) -> torch.Tensor:
    """Brightness of the transferred pixels."""
    header, pixels = pack_clips(clips)
    return Brightness()(unpack_clips(check_clips(header, memoryview(bytearray(pixels))))).values


def crowd(count: int) -> list[Clips]:
    return [clips_of(f"prompt {'i' * number}") for number in range(count)]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.booleans())
@settings(max_examples=30, deadline=None)
def test_clips_and_scores_are_transferred_unchanged(
    samples: int, frames: int, height: int, width: int, images: bool
) -> None:
    levels = torch.randint(0, 256, (samples, frames + 1, 3, height, width)).float() / 255
    texts = tuple("öß\n漢"[:i] for i in range(samples))
    clips = Clips(levels[:, 1:], 12.5, texts, levels[:, 0] if images else None)
    header, pixels = pack_clips(clips)
    actual = unpack_clips(check_clips(json.loads(json.dumps(header)), memoryview(bytearray(pixels))))
    assert torch.equal(actual.videos, clips.videos)
    assert (actual.texts, actual.fps) == (clips.texts, clips.fps)
    assert (actual.images is None) if clips.images is None else torch.equal(actual.images, clips.images)
    scores = FrameScores(torch.randn(samples, frames), clips.times, torch.rand(samples, frames))
    again = unpack_scores(json.loads(json.dumps(pack_scores(scores))))
    assert torch.equal(again.values, scores.values)
    assert torch.equal(again.times, scores.times)
    assert torch.equal(again.std, scores.std)
    assert unpack_scores({"values": [[1.0]], "times": None}).std is None, "of servers and workers that know no std"
    for std in ([], [[0.1, 0.2]], [[0.1], [0.2]]):
        with pytest.raises(MalformedMessage, match="rows of scores, or of std"):
            unpack_scores({"values": [[1.0]], "times": None, "std": std})


def test_a_served_model_describes_itself_and_scores_the_same() -> None:
    with served(Darkness()) as server:
        remote = RemoteReward(url_of(server), videos_per_request=2)
        assert isinstance(remote, RewardModel)
        assert (remote.name, remote.version, remote.kind) == ("brightness", "7-8bit", "test")
        assert (remote.range, remote.frames) == ((0.0, 1.0), FrameSampling(fps=4.0))
        assert not remote.higher_is_better, "the client returns the model's scores"
        clips = clips_of("five", samples=5)
        actual = remote(clips)
        assert torch.equal(actual.values, expected(clips))
        assert torch.equal(actual.times, clips.times)
        assert server.service.scored == 3


MISHAPS = ("dropped", "busy", "scored and lost", "garbled", "cut short", "none")


def test_an_unreliable_connection_changes_no_bit_and_scores_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request has all mishaps, one per attempt."""
    tries: Counter[str] = Counter()
    send = httpx2.HTTPTransport.handle_request

    def unreliable(self: httpx2.HTTPTransport, request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":
            return send(self, request)
        request_id = request.headers["X-Request-Id"]
        mishap = MISHAPS[tries[request_id]]
        tries[request_id] += 1
        if mishap == "dropped":
            raise httpx2.ConnectError("refused")
        if mishap == "busy":
            return httpx2.Response(503, headers={"Retry-After": "0"})
        if mishap == "garbled":
            return httpx2.Response(200, json={"id": "another", "version": "7", "values": [[9.0]], "times": None})
        if mishap == "cut short":
            return httpx2.Response(200, text='{"id": ')
        response = send(self, request)
        if mishap == "scored and lost":
            response.read()
            raise httpx2.ReadError("the reply is lost")
        return response

    monkeypatch.setattr("bpgo_video.rewards.remote.FIRST_PAUSE", 0.001)
    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", unreliable)
    requests = crowd(24)
    with served(model := Brightness()) as server, ThreadPoolExecutor(8) as clients:
        actual = list(clients.map(RemoteReward(url_of(server)), requests))
    assert all(torch.equal(scores.values, expected(clips)) for clips, scores in zip(requests, actual, strict=True))
    assert model.received == Counter(clips.texts[0] for clips in requests)
    assert set(tries.values()) == {len(MISHAPS)}


def test_many_clients_are_served_in_turn_with_a_bounded_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, most = Limits(waiting=3, patience=0.05), 0
    submit: Callable[..., Future[dict[str, object]]] = RewardService.submit

    def counted(service: RewardService, *arguments: object) -> Future[dict[str, object]]:
        nonlocal most
        most = max(most, limits.waiting - server.turns._value)
        return submit(service, *arguments)

    monkeypatch.setattr(RewardService, "submit", counted)
    requests, model = crowd(30), Brightness(seconds=0.01)
    with served(model, limits=limits) as server, ThreadPoolExecutor(15) as clients:
        actual = list(clients.map(RemoteReward(url_of(server)), requests))
    assert all(torch.equal(scores.values, expected(clips)) for clips, scores in zip(requests, actual, strict=True))
    assert model.received == Counter(clips.texts[0] for clips in requests)
    assert most == limits.waiting


def test_a_full_server_sends_retry_after() -> None:
    with served(model := Waiting(), limits=Limits(waiting=1, patience=0.01)) as server:
        first = threading.Thread(target=RemoteReward(url_of(server)), args=(clips_of("first"),))
        first.start()
        until(server.turns.locked)
        response = post(server, body_of(clips_of("second")))
        assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
        assert "1 requests are waiting" in response.json()["error"]
        model.may_score.set()
        first.join()


def test_a_server_answers_pending_requests_before_it_shuts_down() -> None:
    requests = crowd(3)
    with served(model := Waiting()) as server, ThreadPoolExecutor(3) as clients:
        work = [clients.submit(RemoteReward(url_of(server)), clips) for clips in requests]
        until(lambda: server.turns._value == Limits().waiting - 3)
        server.shutdown()
        model.may_score.set()
        actual = [scores.result(timeout=30) for scores in work]
    assert model.received.total() == 3
    assert all(torch.equal(scores.values, expected(clips)) for clips, scores in zip(requests, actual, strict=True))


def test_a_client_waits_while_a_server_restarts() -> None:
    with served(model := Brightness()) as server:
        port, remote = server.server_address[1], RemoteReward(url_of(server), timeout=30.0)
        remote(clips_of("before"))
    with ThreadPoolExecutor(1) as client:
        waiting = client.submit(remote, clips_of("after"))
        time.sleep(0.3)
        assert not waiting.done()
        with served(model, port=port):
            assert torch.equal(waiting.result(timeout=20).values, expected(clips_of("after")))
    assert model.received == {"before": 1, "after": 1}


def test_a_server_that_is_gone_or_serves_another_version_is_an_error() -> None:
    with served(Brightness()) as server:
        port, remote = server.server_address[1], RemoteReward(url_of(server), timeout=1.0)
    with pytest.raises(TimeoutError, match=r"/score failed \d+ times; the last time: ConnectError"):
        remote(clips_of("nobody"))
    other = Brightness()
    other.version = "8"
    message = "now serves version 8-8bit; the run began with 7"
    with served(other, port=port), pytest.raises(MalformedMessage, match=message):
        remote(clips_of("another"))


def test_a_slow_server_ends_the_call_within_its_timeout() -> None:
    with served(Brightness(seconds=1.5)) as server:
        remote = RemoteReward(url_of(server), timeout=0.6, patience=0.2)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="the last time: ReadTimeout"):
            remote(clips_of("slow"))
        assert time.monotonic() - started < 0.7


def test_a_model_that_fails_ends_the_call_with_its_error_at_once() -> None:
    with served(model := Breaking()) as server:
        remote = RemoteReward(url_of(server))
        with pytest.raises(ConnectionError, match=r"status 500: .*the model failed: KeyError: 'no such weight'"):
            remote(clips_of("second"))
        assert torch.equal(remote(clips_of("next")).values, expected(clips_of("next")))
    assert model.received == {"second": 1, "next": 1}


def test_a_suite_negates_remote_scores_and_names_failed_samples() -> None:
    first, second = chunks_of()
    for model, sign in ((Darkness(), -1), (Breaking(), 1)):
        with served(model) as server:
            config = RewardConfig(model="remote", options={"url": url_of(server)}, timeout=20.0)
            suite = RewardSuite({"far": config}, CPU, fps=8.0)
            actual = suite.score(first, PROMPTS).frames["far"].values
            assert torch.equal(actual, sign * expected(Clips(first.videos, 8.0, ("first",) * 2)))
            if isinstance(model, Breaking):
                message = (
                    r"reward 'far' on samples 0, 1 of prompt 'second' \(id 6\) failed: ConnectionError: .* KeyError"
                )
                with pytest.raises(RewardError, match=message):
                    suite.score(second, PROMPTS)


def body_of(clips: Clips) -> bytes:
    header, pixels = pack_clips(clips)
    return json.dumps(header).encode() + b"\n" + bytes(pixels)


def post(
    server: RewardServer, body: bytes, path: str = "/score", headers: dict[str, str | bytes] | None = None
) -> httpx2.Response:
    stated = {"X-Request-Id": "some-request", "Content-Length": str(len(body))} | (headers or {})
    return httpx2.post(url_of(server) + path, content=iter([body]), headers=stated, timeout=10, trust_env=False)


GOOD = body_of(clips_of("good"))
HEADER, PIXELS = GOOD.split(b"\n", 1)
REFUSED = [
    (b"\x80\x04pickle", {}, 400, "does not begin with a line of JSON"),
    (b"[1, 2]\n", {}, 400, "message: "),
    (b'{"videos": [2, 3, 8, 6], "fps": 0, "texts": []}\n', {}, 400, "fps: Input should be greater than 0"),
    (b'{"videos": [2, -3, 8, 6], "fps": 8, "texts": []}\n', {}, 400, "videos.1: Input should be greater"),
    (HEADER.replace(b'"fps"', b'"code"') + b"\n" + PIXELS, {}, 400, "code: Extra inputs are not permitted"),
    (HEADER.replace(b'"fps"', b'"fps": 1, "fps"') + b"\n" + PIXELS, {}, 400, "the key 'fps' appears twice"),
    (HEADER.decode().encode("utf-16-le") + b"\n" + PIXELS, {}, 400, "a line of JSON"),
    (HEADER.replace(b"[2, 3", b'["2", 3') + b"\n" + PIXELS, {}, 400, "videos.0: Input should be a valid integer"),
    (HEADER.replace(b"[2, 3", b"[2.0, 3") + b"\n" + PIXELS, {}, 400, "videos.0: Input should be a valid integer"),
    (HEADER.replace(b"8.0", b"true") + b"\n" + PIXELS, {}, 400, "fps: Input should be a valid number"),
    (HEADER.replace(b"false", b"0") + b"\n" + PIXELS, {}, 400, "images: Input should be a valid boolean"),
    (HEADER.replace(b'"good", ', b"") + b"\n" + PIXELS, {}, 400, "1 texts for 2 videos"),
    (GOOD[:-1], {}, 400, "there are 863 bytes of pixels; [2, 3, 8, 6] need 864"),
    (GOOD, {"X-Request-Id": "../../etc"}, 400, "8 to 64 letters"),
    (GOOD, {"Content-Length": "", "Transfer-Encoding": "chunked"}, 411, "must state the size"),
    (GOOD + bytes(10_000), {}, 413, "this server takes 5000"),
    (GOOD, {"Authorization": "Bearer guess"}, 401, "does not hold this server's token"),
    (GOOD, {"Authorization": b"Bearer \xff"}, 401, "does not hold this server's token"),
]


def test_a_malformed_request_is_refused_with_a_reason_and_the_next_is_served() -> None:
    token = {"Authorization": "Bearer secret"}
    with served(model := Brightness(), token="secret", limits=Limits(bytes=5000)) as server:
        for body, headers, status, message in REFUSED:
            sent = {name: value for name, value in (token | headers).items() if value}
            if "Transfer-Encoding" in headers:
                response = httpx2.post(f"{url_of(server)}/score", content=iter([body]), headers=sent, trust_env=False)
            else:
                response = post(server, body, headers=sent)
            assert (response.status_code, message in response.json()["error"]) == (status, True), response.text
            assert post(server, GOOD, headers=token).status_code == 200
        assert "POST /score" in post(server, GOOD, "/eval", token).json()["error"]
        assert httpx2.get(f"{url_of(server)}/health", trust_env=False).json() == {"status": "ok"}
        assert httpx2.get(f"{url_of(server)}/reward", trust_env=False).status_code == 401
    assert model.received == {"good": 1}


UPLOAD = b"POST /score HTTP/1.1\r\nHost: a\r\nX-Request-Id: some-request\r\nContent-Length: 900\r\n\r\nhalf a"


@pytest.mark.parametrize(("begun", "uploads"), [(b"", False), (UPLOAD[:30], False), (UPLOAD, True)])
def test_a_silent_client_is_disconnected(begun: bytes, uploads: bool) -> None:
    with served(Brightness(), limits=Limits(patience=0.2)) as server:
        with connected(server) as client:
            client.sendall(begun)
            actual = b"".join(iter(lambda: client.recv(2**16), b""))
        assert actual.startswith(b"HTTP/1.1 408 ") == actual.endswith(b'"6 of 900 bytes arrived"}') == uploads
        assert server.turns._value == Limits().waiting


def connected(server: RewardServer) -> socket.socket:
    return socket.create_connection(server.server_address[:2], timeout=5)


def half_uploaded(server: RewardServer, number: int, body: bytes = b"") -> socket.socket:
    """A connection that announces 900 MB and sends only `body`."""
    client = connected(server)
    client.sendall(UPLOAD.partition(b"\r\n\r\n")[0].replace(b"some-request", b"request-%d" % number))
    client.sendall(b"0" * 6 + b"\r\n\r\n" + body)
    return client


def test_slow_bodies_take_no_turns_and_no_memory_for_what_they_announce() -> None:
    limits = Limits(waiting=2)
    with served(Brightness(), limits=limits) as server, ExitStack() as clients:
        for number in range(20):
            clients.enter_context(closing(half_uploaded(server, number, GOOD[:500])))
        until(lambda: server.uploads.held == 20 * 500)
        started = time.monotonic()
        assert post(server, GOOD).status_code == 200
        assert time.monotonic() - started < 1
    assert server.uploads.held == 0, "a server that ends does not wait for them"


def test_the_slowest_body_gives_way_when_memory_is_full() -> None:
    """Two stalled bodies fill the memory of one request; the third arrives at once."""
    with served(Brightness(), limits=Limits(waiting=1, bytes=1000)) as server, ExitStack() as clients:
        slow = []
        for number in range(2):
            head = UPLOAD.partition(b"half a")[0].replace(b"some-request", b"request-%d" % number)
            slow.append(clients.enter_context(connected(server)))
            slow[-1].sendall(head + GOOD[:450])
            until(lambda: server.uploads.held == 450 * len(slow))
        assert post(server, GOOD).status_code == 200
        assert b"408" in slow[0].recv(100)
        assert server.uploads.held <= 1000


@pytest.mark.parametrize("piece", [b"X", b"a body"])
def test_a_trickling_client_has_the_same_deadline_as_a_silent_one(piece: bytes) -> None:
    """It is never silent for as long as the patience, but slower than the pace."""
    with served(Brightness(), limits=Limits(patience=0.5)) as server:
        started = time.monotonic()
        with connected(server) as client, suppress(OSError):
            client.sendall(UPLOAD if piece == b"a body" else UPLOAD[:10])
            while time.monotonic() - started < 5:
                client.sendall(piece)
                time.sleep(0.1)
        assert time.monotonic() - started < 2


def test_a_body_that_keeps_the_pace_may_take_longer_than_the_patience() -> None:
    body, limits = body_of(clips_of("steady", 8)), Limits(patience=0.3, pace=3000)
    head = f"POST /score HTTP/1.1\r\nHost: a\r\nX-Request-Id: steady-one\r\nContent-Length: {len(body)}\r\n\r\n"
    with served(Brightness(), limits=limits) as server, closing(connected(server)) as client:
        client.sendall(head.encode())
        for start in range(0, len(body), 600):
            client.sendall(body[start : start + 600])
            time.sleep(0.1)
        assert client.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("begun", [b"", UPLOAD[:30], UPLOAD])
def test_idle_clients_do_not_keep_others_out(begun: bytes) -> None:
    with served(Brightness(), limits=Limits(connections=8)) as server, ExitStack() as clients:
        for _ in range(20):
            idle = clients.enter_context(connected(server))
            idle.sendall(begun)
        until(lambda: 0 < len(server._server.server_state.connections) <= 8)
        assert post(server, GOOD).status_code == 200


def test_connections_that_wait_for_scores_are_not_closed_for_others() -> None:
    requests = crowd(4)
    with served(model := Waiting(), limits=Limits(connections=4)) as server, ThreadPoolExecutor(4) as clients:
        remotes = [RemoteReward(url_of(server)) for _ in requests]
        work = [clients.submit(remote, clips) for remote, clips in zip(remotes, requests, strict=True)]
        until(lambda: server.turns._value == Limits().waiting - 4)
        assert post(server, GOOD).status_code == 503
        model.may_score.set()
        for scores, clips in zip(work, requests, strict=True):
            assert torch.equal(scores.result(timeout=20).values, expected(clips))
    assert model.received.total() == 4


def test_a_client_that_does_not_read_its_reply_is_disconnected() -> None:
    class Talkative(Brightness):
        def __call__(self, clips: Clips) -> FrameScores:
            return FrameScores(torch.zeros(len(clips), 2**20))

    with served(Talkative(), limits=Limits(patience=0.3)) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.server_address[:2])
        head = f"POST /score HTTP/1.1\r\nHost: a\r\nX-Request-Id: deaf-one\r\nContent-Length: {len(GOOD)}\r\n\r\n"
        client.sendall(head.encode() + GOOD)
        until(lambda: server.service.scored == 1)
        until(lambda: not server._server.server_state.connections)


HEAD = b"POST /score HTTP/1.1\r\nHost: a\r\nX-Request-Id: some-request\r\n"
MANY_KEYS = b"{" + b", ".join(b'"%d": 0' % (number % 60_000) for number in range(60_001)) + b"}"
HOSTILE = {
    "nested": HEAD + b"Content-Length: 200001\r\n\r\n" + b"[" * 200_000 + b"\n",
    "long number": HEAD + b"Content-Length: 5011\r\n\r\n" + b'{"videos":' + b"9" * 5000 + b"\n",
    "long length": HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "20 digits": HEAD + b"Content-Length: " + b"9" * 20 + b"\r\n\r\n",
    "negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "a length twice": HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n01234",
    "two ids": HEAD + b"X-Request-Id: other-request\r\nContent-Length: 5\r\n\r\n01234",
    "chunked too": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    "bad chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nzz\r\n\r\n",
    "not UTF-8": HEAD + b'Content-Length: 14\r\n\r\n{"fps": "\xff"}\n',
    "a lone surrogate": HEAD + b'Content-Length: 24\r\n\r\n{"texts": ["\\ud800xxx"]}\n',
    "infinite": HEAD + b'Content-Length: 15\r\n\r\n{"fps": 1e9999\n',
    "many keys": HEAD + b"Content-Length: %d\r\n\r\n" % len(MANY_KEYS) + MANY_KEYS,
    "HTTP/2": b"GET /health HTTP/2.0\r\nHost: a\r\n\r\n",
    "no newline": HEAD + b"Content-Length: 2\r\n\r\n{}",
    "empty": HEAD + b"Content-Length: 0\r\n\r\n",
    "a bad host": HEAD.replace(b"Host: a", b"Host: [") + b"Content-Length: 2\r\n\r\n{}",
    "no host": HEAD.replace(b"Host: a\r\n", b"") + b"Content-Length: 2\r\n\r\n{}",
    "a bad path": b"GET /%ff%00%0a HTTP/1.1\r\nHost: a\r\n\r\n",
    "a bad method": b"G\x00T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "an upgrade": b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "long headers": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000,
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
}


def test_no_message_of_a_client_is_an_error_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    with served(model := Brightness(), limits=Limits(patience=0.3)) as server:
        for name, message in HOSTILE.items():
            with connected(server) as client:
                client.sendall(message)
                status = client.recv(2**16).partition(b" ")[2][:3]
            allowed = {"an upgrade": b"200", "a bad path": b"404"}.get(name, b"4")
            assert status.startswith(allowed), name
        assert post(server, GOOD).status_code == 200
    assert model.received == {"good": 1}
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


def test_no_sequence_of_messages_is_an_error_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    pieces = [piece for message in HOSTILE.values() for piece in (message[:5000], *message[:5000].split(b"\r\n"))]
    with served(Brightness(), limits=Limits(patience=0.2)) as server:
        for seed in range(60):
            with connected(server) as client, suppress(OSError):
                for piece in random.Random(seed).choices(pieces, k=6):
                    client.sendall(piece)
                client.shutdown(socket.SHUT_WR)
                while client.recv(2**16):
                    pass
        assert post(server, GOOD).status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


def test_an_id_cannot_be_reused_for_another_request() -> None:
    with served(model := Brightness()) as server:
        first, again = (post(server, GOOD).json() for _ in range(2))
        assert first == again
        assert post(server, body_of(clips_of("other"))).status_code == 409
    assert model.received == {"good": 1}


def test_cached_scores_are_bounded_in_number_and_age() -> None:
    service = RewardService(Brightness(), CPU, kept=3)
    header, pixels = pack_clips(clips_of("one"))
    clips = check_clips(header, memoryview(bytearray(pixels)))
    for number in range(10):
        service.submit(f"id-{number}", b"", clips).result(5)
    assert len(service._jobs) == 4
    service.submit("id-7", b"", clips)
    with pytest.raises(Refused, match="id-9 was used for another request"):
        service.submit("id-9", b"other", clips)
    service.close()
    assert service.scored == 10
    brief = RewardService(Brightness(), CPU, keep_seconds=0.0)
    for _ in range(2):
        brief.submit("same-id", b"", clips).result(5)
        time.sleep(0.01)
    brief.close()
    assert brief.scored == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "node7"])
def test_other_machines_need_a_token(host: str) -> None:
    check_exposure(host, "secret")
    with pytest.raises(ConfigError, match=r"there is no token.*--token-env"):
        check_exposure(host, None)
    for own in ("127.0.0.1", "::1", "localhost"):
        check_exposure(own, None)


def test_a_client_sends_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(Brightness(), token="secret") as server:
        monkeypatch.setenv("REWARD_TOKEN", "secret")
        clips = clips_of("token")
        assert torch.equal(RemoteReward(url_of(server), "REWARD_TOKEN")(clips).values, expected(clips))
        monkeypatch.setenv("REWARD_TOKEN", "wrong")
        with pytest.raises(ConnectionError, match="refused with status 401"):
            RemoteReward(url_of(server), "REWARD_TOKEN")
        with pytest.raises(ValueError, match="token_env names NO_TOKEN, which is not set"):
            RemoteReward(url_of(server), "NO_TOKEN")
    urls = ("file:///etc/passwd", "node7:8011", "http://node7:port", "http://", "http://me:hidden@node7:8011",
            "http://node7:8011/?token=hidden")  # fmt: skip
    for url in urls:
        with pytest.raises(ValueError, match="must be like http://host:port") as caught:
            RemoteReward(url)
        assert "hidden" not in str(caught.value)


@contextmanager
def impostor(reply: bytes, size: int = 2**20, pause: float = 0.0) -> Iterator[str]:
    """The URL of a server that sends `reply` in pieces of a size, with pauses, to one client after another."""

    def answer() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            with client, suppress(OSError):
                client.recv(2**16)
                for start in range(0, len(reply), size):
                    client.sendall(reply[start : start + size])
                    time.sleep(pause)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 100_000, "a reply that is not JSON"),
        (b'{"name": "a", "version": "1", "range": [0, 1]}', "max_bytes: Field required"),
        (b'{"name": "a", "version": "1", "range": [0, 1], "max_bytes": %s}' % (b"9" * 5000), "not JSON"),
    ],
)
def test_a_malformed_description_is_an_error_with_a_reason(body: bytes, message: str) -> None:
    reply = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with impostor(reply) as url, pytest.raises((TimeoutError, MalformedMessage), match=message):
        RemoteReward(url, start_timeout=0.2)


def test_a_reply_that_trickles_ends_with_the_deadline() -> None:
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000
    with impostor(reply, size=1, pause=0.01) as url:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="does not end"):
            RemoteReward(url, start_timeout=1.0)
        assert time.monotonic() - started < 3


def test_a_compressed_reply_is_not_expanded() -> None:
    body = gzip.compress(bytes(10_000_000))
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    with impostor(head + body) as url, pytest.raises(TimeoutError, match="compressed by 'gzip'"):
        RemoteReward(url, start_timeout=0.2)


def test_a_request_above_the_limit_is_an_error_before_it_is_sent() -> None:
    with served(Brightness(), limits=Limits(bytes=900)) as server:
        clips = clips_of("large", 4)
        with pytest.raises(ValueError, match=r"takes 900: set options\.videos_per_request"):
            RemoteReward(url_of(server))(clips)
        assert torch.equal(RemoteReward(url_of(server), videos_per_request=1)(clips).values, expected(clips))


def test_no_prompt_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), served(Brightness()) as server:
        post(server, body_of(clips_of("a private wish")))
        post(server, body_of(clips_of("a private wish")) + b"x", headers={"X-Request-Id": "another-id"})
        post(server, b"", path="/a-private-wish")
    assert "POST /score 200" in caplog.text
    logged = [record.getMessage() for record in caplog.records if record.name != "httpx2"]
    assert not any("wish" in line for line in logged)


RECIPE_REWARD = ["--config", str(ROOT / "pipelines" / "configs" / "tiny_wan_bpgo.yaml"), "--reward", "oracle"]


@contextmanager
def started(port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run tools/serve_rewards.py in a process; yield the process and the printed URL."""
    command = [sys.executable, "tools/serve_rewards.py", *RECIPE_REWARD, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        actual = re.search(r"http://\S+", process.stdout.readline())
        assert actual, "it prints its address"
        yield process, actual[0]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_server_killed_under_load_and_restarted_loses_no_request() -> None:
    videos = torch.rand(20, 2, 9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    requests = [Clips(two, 8.0, ("a red circle moving left", "a blue object")) for two in videos]
    with ThreadPoolExecutor(4) as clients:
        with started() as (process, url):
            remote = RemoteReward(url, timeout=120.0)
            alone = [remote(clips).values for clips in requests]
            work = [clients.submit(remote, clips) for clips in requests]
            work[2].result(timeout=60)
            process.send_signal(signal.SIGKILL)
        with started(int(url.rsplit(":", 1)[1])) as (process, _):
            actual = [scores.result(timeout=120).values for scores in work]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert all(torch.equal(one, other) for one, other in zip(alone, actual, strict=True))


@pytest.mark.slow
def test_the_command_refuses_unsafe_hosts_and_unknown_or_remote_rewards(tmp_path: Path) -> None:
    recipe = tmp_path / "remote.yaml"
    far = "{model: remote, options: {url: 'http://a:1'}}"
    recipe.write_text(f"base: {RECIPE_REWARD[1]}\nrewards: {{far: {far}}}\n")
    for arguments, message in (
        ([*RECIPE_REWARD, "--host", "0.0.0.0"], "there is no token"),
        ([*RECIPE_REWARD[:3], "taste"], "--reward is 'taste'; known are alignment, motion, oracle"),
        (["--config", str(recipe), "--reward", "far"], "give --config a recipe that names the model to serve"),
    ):
        command = [sys.executable, "tools/serve_rewards.py", *arguments, "--port", "0"]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
