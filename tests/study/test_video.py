"""The video study: the noisy reward's errors, recipes of arms, paired results, and a run of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpgo_video.commands import study
from bpgo_video.config.bpgo import Config
from bpgo_video.config.reading import config_from_dict, read_tree
from bpgo_video.documents import to_yaml
from bpgo_video.rewards.base import Clips
from bpgo_video.study import video, video_report
from bpgo_video.study.noisy import NoisyReward
from bpgo_video.study.preregistration import read_preregistration
from bpgo_video.study.video import VideoRun

PLAN = read_preregistration().video
FLICKER = "temporal_flickering"


def errors(text: str, seed: int = 0, count: int = 400, **keys: float) -> torch.Tensor:
    """The errors of the frames of `count` videos."""
    videos = torch.rand(count, 5, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    clips = Clips(videos, 8.0, (text,) * count)
    noisy, plain = (NoisyReward(FLICKER, of, 3 * of, seed=seed, **keys) for of in (0.5, 0.0))
    return noisy(clips).values - plain(clips).values


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_errors_have_the_stated_deviation(share: float) -> None:
    """400 draws: the standard error of a deviation is 3.5 %."""
    clear, ambiguous = (errors(text, shared=share) for text in ("a red circle moving left", "a red object"))
    assert clear.mean(dim=1).std() == pytest.approx(0.5, rel=0.15)
    assert ambiguous.mean(dim=1).std() == pytest.approx(1.5, rel=0.15)
    frames = clear.shape[1]
    assert clear.std(dim=1).square().mean().sqrt() == pytest.approx(0.5 * ((1 - share) * frames) ** 0.5, rel=0.15)


def test_an_error_is_a_function_of_video_and_seed() -> None:
    assert torch.equal(errors("a red object"), errors("a red object"))
    both = torch.stack([errors("a red object", seed=seed).mean(dim=1) for seed in (0, 1)])
    assert torch.corrcoef(both)[0, 1].abs() < 0.2, "another seed is an independent scoring"
    with pytest.raises(ValueError, match=r"shared=2"):
        NoisyReward(FLICKER, 0.1, 0.1, shared=2)


@pytest.mark.parametrize("name", PLAN.arms)
def test_each_arm_is_a_valid_recipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(video.recipe_of(PLAN, PLAN.arms[name], tmp_path)))
    config = config_from_dict(read_tree(path)[0])
    assert isinstance(config, Config)
    assert config.bpgo.match_rms
    assert not config.needs_prior
    assert 1 + len(config.rewards["noisy"].rescorings) == PLAN.arms[name].scorings
    assert config.uses_trust == (name in ("frames", "mean_reliability"))


def test_arms_are_compared_on_the_same_seeds() -> None:
    arms = {name: PLAN.arms[name] for name in ("grpo", "frames", "mean_of_two")}
    plan = replace(PLAN, seeds=3, first_seed=0, arms=arms)
    runs = [VideoRun("grpo", seed, 0.5, 0.5 + 0.1 * (seed + 1), 10, 10, 60.0) for seed in range(3)]
    runs += [VideoRun("frames", seed, 0.5, 0.5 + 0.1 * (seed + 1) + 0.02, 10, 10, 60.0) for seed in range(3)]
    results = video_report.compare(plan, [*runs, VideoRun("mean_of_two", 0, 0.5, 0.9, 10, 20, 60.0)])
    assert [result.arm for result in results] == ["grpo", "frames"], "the third has not run on all seeds"
    assert results[0].found is None
    assert results[1].found is not None
    assert results[1].found.mean == pytest.approx(100 * 0.02 / 0.2)
    text = video_report.as_markdown(plan, results, {"command": "x"})
    assert "| `frames` | +.220 ± .058 | +10.00 [+10.00, +10.00] | 10 | 10 | 1.0 |" in text


@pytest.mark.slow
def test_a_study_runs_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = (study.PREREGISTRATION).read_text()
    head, _, tail = tree.partition("\nvideo:\n")
    for old, new in (("steps: 40", "steps: 1"), ("seeds: 6", "seeds: 1"), ("samples: 28", "samples: 1")):
        assert old in tail
        tail = tail.replace(old, new)
    own = tmp_path / "own.yaml"
    own.write_text(f"{head}\nvideo:\n{tail}")
    words = ["video", "--output", str(tmp_path / "out"), "--preregistration", str(own), "--processes", "2"]
    assert study.main(words) == 0
    first = (tmp_path / "out" / "results.jsonl").read_text()
    lines = [json.loads(line) for line in first.splitlines()]
    assert {line["arm"]: line["reward_calls"] for line in lines} == {
        "grpo": 32, "grpo_twice": 64, "frames": 32, "mean_of_two": 64, "mean_reliability": 64,
    }  # fmt: skip
    assert study.main(words) == 0
    assert (tmp_path / "out" / "results.jsonl").read_text() == first, "nothing ran again"
    assert "| `mean_reliability` |" in capsys.readouterr().out
    own.write_text(f"{head}\nvideo:\n{tail.replace('shared: 0.5', 'shared: 0.25')}")
    assert study.main(words) == 2
    assert "shared" in capsys.readouterr().err
