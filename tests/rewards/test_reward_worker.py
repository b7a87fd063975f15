"""Reward workers: a model in a child process, under an interpreter with only the standard library."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.rewards import Clips
from bpgo_video.rewards.base import RewardModel
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rewards.wire import MalformedMessage
from bpgo_video.rewards.worker import WorkerReward
from tests.made.recipes import ROOT, python_path

SCRIPT = str(ROOT / "tests" / "made" / "toy_worker.py")
PLAIN = sys._base_executable  # type: ignore[attr-defined]  # outside of the virtual environment


def clips_of(samples: int = 2, frames: int = 3, images: bool = False) -> Clips:
    generator = torch.Generator().manual_seed(samples)
    videos = torch.rand(samples, frames, 3, 4, 6, generator=generator)
    pictures = torch.rand(samples, 3, 4, 6, generator=generator) if images else None
    return Clips(videos, 8.0, tuple(f"prompt {i}" for i in range(samples)), pictures)


def worker(how: str = "", once: str = "", **options: object) -> WorkerReward:
    return WorkerReward(PLAIN, SCRIPT, settings={"how": how, "once": once}, **options)


def ended(pid: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_worker_scores_the_pixels_that_it_receives() -> None:
    model = worker()
    assert isinstance(model, RewardModel)
    assert (model.name, model.version, model.range) == ("brightness", "toy-1-8bit", (0.0, 255.0))
    for samples in (2, 5, 1):
        clips = clips_of(samples)
        actual = model(clips)
        torch.testing.assert_close(actual.values, (clips.videos * 255).round().mean(dim=(2, 3, 4)))
        assert actual.times is not None
        assert actual.times.tolist() == [0.0, 0.125, 0.25]
    pictured = clips_of(images=True)
    assert pictured.images is not None
    torch.testing.assert_close(model(pictured).values[:, 0], (pictured.images * 255).round().mean(dim=(1, 2, 3)))
    assert actual.std is None
    model.close()
    assert ended(model.pid)


def test_a_worker_may_state_the_std_of_its_scores() -> None:
    model = worker(how="states its std")
    assert model(clips_of(2)).std.tolist() == [[0.5] * 3] * 2
    model.close()


def test_a_dead_worker_is_restarted_and_scores_the_same(tmp_path: Path) -> None:
    clips = clips_of()
    steady, mortal = worker(), worker("dies", str(tmp_path / "died"))
    first = mortal.pid
    assert torch.equal(mortal(clips).values, steady(clips).values)
    assert mortal.pid != first
    assert ended(first)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("dies", ConnectionError, "the worker ended with exit code -9"),
        ("raises", RuntimeError, "in the worker: KeyError: 'no such weight'"),
        ("hangs", TimeoutError, "has not answered in time"),
    ],
)
def test_a_failing_worker_is_an_error_with_its_reason(how: str, error: type[Exception], message: str) -> None:
    model = worker(how, restarts=1, timeout=1.0)
    started = time.monotonic()
    with pytest.raises(error, match=message):
        model(clips_of())
    assert time.monotonic() - started < 2.0
    model.close()
    assert ended(model.pid), "a hanging worker exits with its parent"


@pytest.mark.parametrize(
    ("reply", "message"),
    [("hello", "'hello', which is not a JSON object"), ('{"hello": {"name": "x"}}', "version: Field required")],
)
def test_a_malformed_reply_is_refused(tmp_path: Path, reply: str, message: str) -> None:
    script = tmp_path / "garbage.py"
    script.write_text(f"print({reply!r}, flush=True)\nimport time\ntime.sleep(60)\n")
    with pytest.raises(MalformedMessage, match=message):
        WorkerReward(PLAIN, str(script))


def test_a_worker_that_cannot_start_is_a_config_error() -> None:
    options = {"python": PLAIN, "script": SCRIPT, "settings": {"how": "never ready"}}
    with pytest.raises(ConfigError, match=r"rewards.toy .*the worker ended with exit code 1; see its own output"):
        RewardSuite({"toy": RewardConfig(model="worker", options=options)}, torch.device("cpu"), fps=8.0)
    with pytest.raises(ConfigError, match=r"script 'nowhere\.py' does not exist"):
        RewardSuite(
            {"toy": RewardConfig(model="worker", options={**options, "script": "nowhere.py"})},
            torch.device("cpu"),
            fps=8.0,
        )


OWNER = """
import os, sys, threading, time, torch
from bpgo_video.rewards import Clips
from bpgo_video.rewards.worker import WorkerReward
model = WorkerReward(sys.argv[1], sys.argv[2], settings={"how": "hangs"})
print(model.pid, flush=True)
threading.Thread(target=model, args=(Clips(torch.zeros(1, 1, 3, 2, 2), 8.0, ("",)),), daemon=True).start()
time.sleep(1)
os._exit(1)  # as the heartbeat ends a rank
"""


def test_a_busy_worker_exits_when_its_parent_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": python_path()}
    command = [sys.executable, "-c", OWNER, PLAIN, SCRIPT]
    owner = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert owner.returncode == 1
    assert ended(int(owner.stdout))
