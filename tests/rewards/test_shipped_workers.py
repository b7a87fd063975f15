"""Shipped reward workers in their own process and a real suite, on stubs of their packages' published interfaces."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rewards.worker import WORKER_SIDE, WORKERS, script_file
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk
from tests.made.recipes import ROOT
from tests.rewards.test_reward_worker import PLAIN, SCRIPT
from tests.rewards.toys import CPU, MESH

PACKAGES = ROOT / "tests" / "made" / "reward_packages"
FRAMES, FPS = 17, 8.0
TEXTS = ("a red circle", "two dogs that run over a long bridge")
VIDEOCLIP = str(PACKAGES / "videoclip_xl")


@pytest.fixture
def videos() -> np.ndarray:
    """Two samples for each prompt, in 8 bits: [4, frames, height, width, 3]."""
    return np.random.default_rng(0).integers(0, 256, (4, FRAMES, 20, 28, 3), dtype=np.uint8)


def weights_of_videoclip(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"vision_model.weight": (24, 5), "text_model.weight": (248, 5)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(weights, folder / "VideoCLIP-XL-v2.bin")
    return folder / "VideoCLIP-XL-v2.bin", weights


@contextmanager
def suite_on(script: str, **settings: Any) -> Iterator[RewardSuite]:
    """A suite with a worker under this interpreter, with the stubs on its path."""
    environment = {"PYTHONPATH": str(PACKAGES)}
    options = {"python": sys.executable, "script": script, "settings": settings, "environment": environment}
    suite = RewardSuite({"reward": RewardConfig(model="worker", options=options)}, CPU, FPS)
    yield suite
    suite.rewards["reward"].model.close()


def scores_of(suite: RewardSuite, videos: np.ndarray, texts: tuple[str, str] = TEXTS) -> Rewards:
    prompts = PromptBatch(torch.tensor([5, 6]), texts, {})
    pixels = torch.from_numpy(videos).movedim(-1, 2).float() / 255
    chunk = RolloutChunk((), pixels, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    return suite.gather([suite.score(chunk, prompts)], prompts, 2, MESH)


def test_image_reward_scores_evenly_spread_frames_for_the_prompt(videos: np.ndarray) -> None:
    with suite_on("image_reward", frames=4) as suite:
        rewards = scores_of(suite, videos)
    chosen = [0, 5, 11, 16]
    lengths = np.array([len(text) for text in TEXTS])[:, None, None]
    expected = videos[:, chosen].mean(axis=(2, 3))[..., 0].reshape(2, 2, 4) - lengths
    np.testing.assert_allclose(rewards.per_frame["reward"], expected, rtol=1e-5)
    assert rewards.frame_times["reward"].tolist() == [frame / FPS for frame in chosen]
    assert suite.versions == {"reward": "ImageReward-v1.0-4-8bit"}
    assert not rewards.stds


def test_hps_v3_states_the_std_of_each_frame(videos: np.ndarray) -> None:
    with suite_on("hps_v3", frames=4) as suite:
        rewards = scores_of(suite, videos)
        with pytest.raises(RewardError, match=r"the prompt 'a <\|Reward\|>' contains <\|Reward\|>; remove it"):
            scores_of(suite, videos, ("a dog", "a <|Reward|>"))
    chosen = [0, 5, 11, 16]
    means = videos[:, chosen].mean(axis=(2, 3)).reshape(2, 2, 4, 3)
    lengths = np.array([len(text) for text in TEXTS])[:, None, None]
    np.testing.assert_allclose(rewards.per_frame["reward"], means[..., 1] - lengths, rtol=1e-5)
    np.testing.assert_allclose(rewards.by_name["reward"], (means[..., 1] - lengths).mean(axis=2), rtol=1e-5)
    std_of_mean = np.sqrt((means[..., 2] ** 2).sum(axis=2)) / 4
    np.testing.assert_allclose(rewards.stds["reward"], std_of_mean, rtol=1e-5)
    assert rewards.frame_times["reward"].tolist() == [frame / FPS for frame in chosen]
    assert suite.versions == {"reward": "hpsv3-1.0.0-HPSv3.safetensors-4-8bit"}
    assert suite.rewards["reward"].model.range == (-math.inf, math.inf)


def test_videoclip_xl_is_the_cosine_of_eight_frames_and_the_prompt(videos: np.ndarray, tmp_path: Path) -> None:
    path, weights = weights_of_videoclip(tmp_path)
    with suite_on("videoclip_xl", folder=VIDEOCLIP, weights=str(path)) as suite:
        for chosen, rewards in (
            (range(0, 16, 2), scores_of(suite, videos)),
            ([0, 0, 1, 1, 2, 3, 3, 4], scores_of(suite, videos[:, :5])),
        ):
            expected = [cosine(video[list(chosen)], TEXTS[row // 2], weights) for row, video in enumerate(videos)]
            np.testing.assert_allclose(rewards.by_name["reward"].flatten(), expected, atol=1e-5)
            assert rewards.frame_times["reward"] is None
            assert np.std(expected) > 0.01
    assert suite.versions == {"reward": "VideoCLIP-XL-v2.bin-8bit"}


def cosine(frames: np.ndarray, text: str, weights: dict[str, torch.Tensor]) -> float:
    """Of the stub's features, from pixels prepared as in the authors' demo."""
    pixels = np.stack([cv2.resize(frame, (224, 224)) for frame in frames]) / 255
    pixels = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    seen = torch.tensor(pixels.mean(axis=(1, 2)).reshape(-1), dtype=torch.float32) @ weights["vision_model.weight"]
    words = torch.tensor([float(len(word)) for word in text.split()])
    read = words @ weights["text_model.weight"][: len(words)]
    return float(seen @ read / (seen.norm() * read.norm()))


def test_a_name_without_a_worker_lists_the_shipped_ones() -> None:
    options = {"python": PLAIN, "script": "videoclip"}
    known = r"known are hps_v3, image_reward, videoclip_xl, or a file of your own.*; perhaps you meant videoclip_xl"
    with pytest.raises(ConfigError, match=rf"script is 'videoclip'; {known}"):
        RewardSuite({"a": RewardConfig(model="worker", options=options)}, CPU, FPS)
    assert Path(script_file("hps_v3")) == WORKERS / "hps_v3.py"
    assert script_file(SCRIPT) == SCRIPT


def self_test(python: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(WORKER_SIDE), str(PACKAGES)])}
    command = [python, script, "--self-test", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_self_test_prints_the_scores_of_two_clips() -> None:
    done = self_test(PLAIN, SCRIPT, "--settings", '{"how": "states its std"}')
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert "brightness toy-1, range 0.0 to 255.0" in shown
    square, gray = 48 * 48, 128 * 192 - 48 * 48
    means = [(square * sum(color) / 3 + gray * 128) / (128 * 192) for color in ((220, 30, 30), (30, 30, 220))]
    for text, mean in zip(("a red square moving right", "a blue square that does not move"), means, strict=True):
        (line,) = [line for line in shown if line.startswith(f"{text}: ")]
        values, std = (json.loads(part) for part in line.removeprefix(f"{text}: ").split(", std "))
        assert values == pytest.approx([mean] * 17)
        assert std == [0.5] * 17
    assert shown[-1] == f"as a run takes them; seconds {[frame / 8 for frame in range(17)]}"


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ("[[1.0]]", "1 rows of scores for 2 videos"),
        ("[[1.0], [1.0, 2.0]]", r"rows of [1, 2] scores for 1 times"),
        ("([[1.0], [2.0]], [0.0, 0.5])", r"rows of [1, 1] scores for 2 times"),
        ("[[1.0], [float('nan')]]", "a score that is not finite"),
        ("([[1.0, 2.0]] * 2, [0.5, 0.5])", "times that do not increase"),
        ("([[1.0]] * 2, None, [[0.1], [-0.1]])", "a std that is negative or not finite"),
        ("([[1.0]] * 2, None, [[0.1]])", "another number of std than of scores"),
    ],
)
def test_a_self_test_fails_where_a_run_would(tmp_path: Path, scores: str, problem: str) -> None:
    script = tmp_path / "mine.py"
    members = 'name, version, range = "mine", "1", (0.0, 1.0)'
    call = f"def __init__(self, device): pass\n\n    def __call__(self, clips): return {scores}"
    script.write_text(f"from reward_worker import serve\n\n\nclass Mine:\n    {members}\n    {call}\n\n\nserve(Mine)\n")
    done = self_test(PLAIN, str(script))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, f"refused: {problem}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image_reward", "hps_v3", "videoclip_xl"])
def test_shipped_workers_pass_their_self_test_on_stubs(tmp_path: Path, name: str) -> None:
    path, _ = weights_of_videoclip(tmp_path)
    settings = {"folder": VIDEOCLIP, "weights": str(path)} if name == "videoclip_xl" else {}
    done = self_test(sys.executable, str(WORKERS / f"{name}.py"), "--settings", json.dumps(settings))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{name} ")
