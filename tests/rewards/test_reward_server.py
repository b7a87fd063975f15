"""A reward model behind HTTP: asked once for each request, whatever happens on the way, and by whom it should be."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.rewards import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.base import RewardError, RewardModel
from bpgo_video.rewards.remote import RemoteReward
from bpgo_video.rewards.server import Handler, Limits, RewardServer, check_exposure
from bpgo_video.rewards.service import OtherContent, RewardService
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rewards.wire import MalformedMessage, packed, received, scores_message, scores_of
from bpgo_video.types import PromptBatch, RolloutChunk
from tests.made.recipes import ROOT, python_path

CPU = torch.device("cpu")


class Counting:
    """Brightness; counts what it is shown, by the text of the first video."""

    name, version, range = "brightness", "7", (0.0, 1.0)
    higher_is_better, differentiable, kind, frames = False, True, "proxy", FrameSampling(fps=4.0)

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.shown: Counter[str] = Counter()

    def __call__(self, clips: Clips) -> FrameScores:
        self.shown[clips.texts[0]] += 1
        time.sleep(self.seconds)
        if clips.texts[0] == "breaks":
            raise KeyError("no such weight")
        return FrameScores(clips.videos.mean(dim=(2, 3, 4)), clips.times)


class Unreliable(Handler):
    """Every request meets all mishaps, one at each try, before or after it has been scored."""

    tries: Counter[str] = Counter()

    def do_POST(self) -> None:
        request_id = self.headers["X-Request-Id"]
        mishap = MISHAPS[self.tries[request_id]]
        self.tries[request_id] += 1
        if mishap == "dropped":
            return
        if mishap == "busy":
            self._send(503, {"error": "come again"})
        elif mishap == "scored and lost":
            self._respond(self._lost)
        elif mishap == "garbled":
            self._send(200, {"id": "another", "version": "7", "values": [[9.0]], "times": None})
        elif mishap == "cut short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"id": ')
        else:
            super().do_POST()

    def _lost(self) -> dict[str, object]:
        self._score()
        raise ConnectionError("the reply is lost")


MISHAPS = ("dropped", "busy", "scored and lost", "garbled", "cut short", "none")


@contextmanager
def served(
    model: RewardModel, token: str | None = None, limits: Limits | None = None, port: int = 0, mishaps: bool = False
) -> Iterator[RewardServer]:
    service = RewardService(model, CPU)
    with RewardServer(service, "127.0.0.1", port, token, limits or Limits()) as server:
        if mishaps:
            server.RequestHandlerClass = Unreliable
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    service.close()


def url_of(server: RewardServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def clips_of(text: str, samples: int = 2) -> Clips:
    generator = torch.Generator().manual_seed(len(text) * 100 + samples)
    texts = tuple(text if i == 0 else f"{text}, video {i}" for i in range(samples))
    return Clips(torch.rand(samples, 3, 3, 8, 6, generator=generator), 8.0, texts)


def expected(clips: Clips) -> torch.Tensor:
    """What the model makes of the pixels as they travel."""
    whole = packed(clips)
    header = json.loads(json.dumps(whole.header))
    return Counting()(received(header, memoryview(bytearray(whole.pixels))).clips()).values


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.booleans())
@settings(max_examples=30, deadline=None)
def test_clips_and_scores_travel_unchanged(samples: int, frames: int, height: int, width: int, pictured: bool) -> None:
    levels = torch.randint(0, 256, (samples, frames + 1, 3, height, width)).float() / 255
    images = levels[:, 0] if pictured else None
    clips = Clips(levels[:, 1:], 12.5, tuple("öß\n漢"[:i] for i in range(samples)), images)
    whole = packed(clips)
    found = received(json.loads(json.dumps(whole.header)), memoryview(bytearray(whole.pixels))).clips()
    assert torch.equal(found.videos, clips.videos)
    assert (found.texts, found.fps) == (clips.texts, clips.fps)
    assert (found.images is None) if images is None else torch.equal(found.images, images)
    scores = FrameScores(torch.randn(samples, frames), clips.times)
    again = scores_of(json.loads(json.dumps(scores_message(scores))))
    assert torch.equal(again.values, scores.values)
    assert torch.equal(again.times, scores.times)


def test_a_served_model_is_what_it_is_here() -> None:
    with served(Counting()) as server:
        remote = RemoteReward(url_of(server), videos_per_request=2)
        assert isinstance(remote, RewardModel)
        assert (remote.name, remote.version, remote.kind) == ("brightness", "7-8bit", "proxy")
        assert not remote.higher_is_better, "scores travel as the model gives them"
        assert remote.frames == FrameSampling(fps=4.0)
        clips = clips_of("five", samples=5)
        found = remote(clips)
        assert torch.equal(found.values, expected(clips))
        assert torch.equal(found.times, clips.times)
        assert server.service.scored == 3


def test_an_unreliable_server_changes_no_bit_and_scores_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpgo_video.rewards.remote.FIRST_PAUSE", 0.001)
    monkeypatch.setattr("bpgo_video.rewards.remote.seconds_of", lambda header: 0.0)
    model = Counting()
    asked = [clips_of(f"prompt {'i' * number}") for number in range(24)]
    with served(model, mishaps=True) as server:
        remote = RemoteReward(url_of(server))
        with ThreadPoolExecutor(8) as clients:
            found = list(clients.map(remote, asked))
    for clips, scores in zip(asked, found, strict=True):
        assert torch.equal(scores.values, expected(clips))
    assert model.shown == Counter(clips.texts[0] for clips in asked)


def test_a_crowd_is_served_in_turn_and_few_requests_are_held() -> None:
    model, held, most = Counting(seconds=0.01), 0, 0
    limits = Limits(waiting=3, patience=0.05)
    asked = [clips_of(f"prompt {'i' * number}") for number in range(30)]
    with served(model, limits=limits) as server:
        body = Handler._body

        def counted(handler: Handler) -> bytearray:
            nonlocal held, most
            held = limits.waiting - server.turns._value
            most = max(most, held)
            return body(handler)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Handler, "_body", counted)
            with ThreadPoolExecutor(15) as clients:
                found = list(clients.map(RemoteReward(url_of(server)), asked))
    assert all(torch.equal(scores.values, expected(clips)) for clips, scores in zip(asked, found, strict=True))
    assert model.shown == Counter(clips.texts[0] for clips in asked)
    assert most == limits.waiting


def test_a_full_server_says_when_to_come_again() -> None:
    with served(Counting(seconds=0.5), limits=Limits(waiting=1, patience=0.01)) as server:
        first = threading.Thread(target=RemoteReward(url_of(server)), args=(clips_of("first"),))
        first.start()
        while server.turns._value:
            time.sleep(0.001)
        status, headers, reply = ask(server, body_of(clips_of("second")))
        assert (status, headers["Retry-After"]) == (429, "1")
        assert "1 requests are waiting" in reply["error"]
        first.join()


def test_a_server_that_comes_back_is_asked_again() -> None:
    model = Counting()
    with served(model) as server:
        port = server.server_address[1]
        remote = RemoteReward(url_of(server), timeout=30.0)
        remote(clips_of("before"))
    with ThreadPoolExecutor(1) as client:
        waiting = client.submit(remote, clips_of("after"))
        time.sleep(0.3)
        assert not waiting.done()
        with served(model, port=port):
            assert torch.equal(waiting.result(timeout=20).values, expected(clips_of("after")))
    assert model.shown == {"before": 1, "after": 1}


def test_a_server_that_is_gone_for_good_or_another_one_is_told() -> None:
    with served(Counting()) as server:
        port = server.server_address[1]
        remote = RemoteReward(url_of(server), timeout=1.0)
    with pytest.raises(TimeoutError, match=r"/score failed \d+ times; the last time: ConnectionRefusedError"):
        remote(clips_of("nobody"))
    other = Counting()
    other.version = "8"
    with (
        served(other, port=port),
        pytest.raises(MalformedMessage, match="now serves version 8-8bit; the run began with 7"),
    ):
        remote(clips_of("another"))


def test_a_slow_server_ends_within_the_timeout() -> None:
    with served(Counting(seconds=1.5)) as server:
        remote = RemoteReward(url_of(server), timeout=0.6, patience=0.2)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="the last time: TimeoutError"):
            remote(clips_of("slow"))
        assert time.monotonic() - started < 0.7


def test_a_model_that_fails_is_told_at_once_with_its_error() -> None:
    with served(model := Counting()) as server:
        remote = RemoteReward(url_of(server))
        with pytest.raises(ConnectionError, match=r"status 500: .*the model failed: KeyError: 'no such weight'"):
            remote(clips_of("breaks"))
        assert torch.equal(remote(clips_of("next")).values, expected(clips_of("next")))
    assert model.shown == {"breaks": 1, "next": 1}


def test_a_recipe_s_reward_is_oriented_here_and_names_whom_it_failed() -> None:
    prompts = PromptBatch(torch.tensor([5, 6]), ("good", "breaks"), {})
    with served(Counting()) as server:
        config = RewardConfig(model="remote", options={"url": url_of(server)}, timeout=20.0)
        suite = RewardSuite({"far": config}, CPU, fps=8.0)
        videos, rows, samples = torch.rand(2, 3, 3, 8, 6), torch.tensor([0, 0]), torch.tensor([2, 3])
        found = suite.score(RolloutChunk((), videos, rows, samples), prompts).scores["far"].values
        assert torch.equal(found, -expected(Clips(videos, 8.0, ("good", "good"))))
        said = r"reward 'far' on samples 2, 3 of prompt 'breaks' \(id 6\) failed: ConnectionError: .* KeyError"
        with pytest.raises(RewardError, match=said):
            suite.score(RolloutChunk((), videos, rows + 1, samples), prompts)


def body_of(clips: Clips) -> bytes:
    whole = packed(clips)
    return json.dumps(whole.header).encode() + b"\n" + bytes(whole.pixels)


def ask(
    server: RewardServer, body: bytes, path: str = "/score", **headers: str
) -> tuple[int, dict[str, str], dict[str, object]]:
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    stated = {"X-Request-Id": "some-request", "Content-Length": str(len(body)), **headers}
    connection.request("POST", path, iter([body]), {name.replace("_", "-"): value for name, value in stated.items()})
    response = connection.getresponse()
    found = response.status, dict(response.getheaders()), json.loads(response.read())
    connection.close()
    return found


GOOD = body_of(clips_of("good"))
HEADER, PIXELS = GOOD.split(b"\n", 1)


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b"\x80\x04pickle", {}, 400, "does not begin with a line of JSON"),
        (b"[1, 2]\n", {}, 400, "message: "),
        (b'{"videos": [2, 3, 8, 6], "fps": 0, "texts": []}\n', {}, 400, "fps: Input should be greater than 0"),
        (b'{"videos": [2, -3, 8, 6], "fps": 8, "texts": []}\n', {}, 400, "videos.1: Input should be greater"),
        (HEADER.replace(b'"fps"', b'"code"') + b"\n" + PIXELS, {}, 400, "code: Unexpected keyword argument"),
        (HEADER.replace(b'"good", ', b"") + b"\n" + PIXELS, {}, 400, "1 texts for 2 videos"),
        (GOOD[:-1], {}, 400, "there are 863 bytes of pixels; [2, 3, 8, 6] need 864"),
        (GOOD, {"X_Request_Id": "../../etc"}, 400, "8 to 64 letters"),
        (GOOD, {"Content_Length": "many"}, 411, "must state the size"),
        (GOOD + bytes(10_000), {}, 413, "this server takes 5000"),
        (GOOD, {"Authorization": "Bearer guess"}, 401, "does not hold this server's token"),
        (GOOD, {"Authorization": "Bearer \xff"}, 401, "does not hold this server's token"),
        (GOOD, {"path": "/eval"}, 404, "POST /score"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(
    body: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    with served(model := Counting(), token="secret", limits=Limits(bytes=5000)) as server:
        found, _, reply = ask(server, body, **{"Authorization": "Bearer secret", **headers})
        assert found == status
        assert said in str(reply["error"])
        assert ask(server, GOOD, Authorization="Bearer secret")[0] == 200, "and the next one is served"
    assert model.shown == {"good": 1}


def test_an_id_stands_for_one_request() -> None:
    with served(model := Counting()) as server:
        first, again = (ask(server, GOOD)[2] for _ in range(2))
        assert first == again
        assert ask(server, body_of(clips_of("other")))[0] == 409
    assert model.shown == {"good": 1}


def test_kept_scores_are_bounded() -> None:
    service = RewardService(Counting(), CPU, kept=3)
    whole = packed(clips_of("one"))
    asked = received(whole.header, memoryview(bytearray(whole.pixels)))
    for number in range(10):
        assert service.submit(f"id-{number}", b"", asked).done.wait(5)
    assert len(service._jobs) <= 4
    with pytest.raises(OtherContent):
        service.submit("id-9", b"other", asked)
    service.close()
    brief = RewardService(Counting(), CPU, keep_seconds=0.0)
    for _ in range(2):
        assert brief.submit("same-id", b"", asked).done.wait(5)
    brief.close()
    assert brief.scored == 2


def test_other_machines_need_a_token() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.7", "node7"):
        check_exposure(host, "secret")
        with pytest.raises(ConfigError, match=r"there is no token.*--token-env"):
            check_exposure(host, None)
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposure(host, None)


def test_a_client_brings_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(Counting(), token="secret") as server:
        monkeypatch.setenv("REWARD_TOKEN", "secret")
        clips = clips_of("token")
        assert torch.equal(RemoteReward(url_of(server), "REWARD_TOKEN")(clips).values, expected(clips))
        monkeypatch.setenv("REWARD_TOKEN", "wrong")
        with pytest.raises(ConnectionError, match="refused with status 401"):
            RemoteReward(url_of(server), "REWARD_TOKEN")
        with pytest.raises(ValueError, match="token_env names NO_TOKEN, which is not set"):
            RemoteReward(url_of(server), "NO_TOKEN")
    with pytest.raises(ValueError, match="must be like http://host:port"):
        RemoteReward("file:///etc/passwd")


def test_too_many_videos_are_known_before_they_are_sent() -> None:
    with served(Counting(), limits=Limits(bytes=900)) as server:
        clips = clips_of("large", 4)
        with pytest.raises(ValueError, match=r"takes 900 in a request: set options\.videos_per_request"):
            RemoteReward(url_of(server))(clips)
        assert torch.equal(RemoteReward(url_of(server), videos_per_request=1)(clips).values, expected(clips))


def test_no_prompt_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), served(Counting()) as server:
        ask(server, body_of(clips_of("a private wish")))
        ask(server, body_of(clips_of("a private wish")) + b"x", X_Request_Id="another-id")
        ask(server, b"", path="/a-private-wish")
    assert "POST /score 200" in caplog.text
    assert "wish" not in caplog.text


RECIPE_REWARD = ["--config", str(ROOT / "pipelines" / "configs" / "tiny_wan_bpgo.yaml"), "--reward", "oracle"]


@contextmanager
def started(port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """tools/serve_rewards.py in a process of its own, and the url that it prints."""
    command = [sys.executable, "tools/serve_rewards.py", *RECIPE_REWARD, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "it has said where it listens"
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_server_that_is_killed_under_load_and_started_again_loses_nothing() -> None:
    videos = torch.rand(20, 2, 9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    asked = [Clips(two, 8.0, ("a red circle moving left", "a blue object")) for two in videos]
    with ThreadPoolExecutor(4) as clients:
        with started() as (process, url):
            remote = RemoteReward(url, timeout=120.0)
            alone = [remote(clips).values for clips in asked]
            work = [clients.submit(remote, clips) for clips in asked]
            work[2].result(timeout=60)
            process.send_signal(signal.SIGKILL)
        with started(int(url.rsplit(":", 1)[1])) as (process, _):
            found = [scores.result(timeout=120).values for scores in work]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert all(torch.equal(one, other) for one, other in zip(alone, found, strict=True))


@pytest.mark.slow
def test_the_tool_refuses_what_it_should_not_serve(tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, "tools/serve_rewards.py", *arguments]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 1, result.stderr
        return result.stderr

    assert "there is no token" in said(*RECIPE_REWARD, "--port", "0", "--host", "0.0.0.0")
    assert "has no reward 'taste'; it has ['alignment', 'motion', 'oracle']" in said(
        *RECIPE_REWARD[:2], "--reward", "taste", "--port", "0"
    )
    recipe = tmp_path / "remote.yaml"
    recipe.write_text(
        f"base: {RECIPE_REWARD[1]}\nrewards: {{far: {{model: remote, options: {{url: 'http://a:1'}}}}}}\n"
    )
    assert "needs a recipe that names the model itself" in said(
        "--config", str(recipe), "--reward", "far", "--port", "0"
    )
