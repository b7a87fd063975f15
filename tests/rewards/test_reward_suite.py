"""A suite of rewards: plugged in by path, oriented, and loud where one fails."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.rewards import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.aggregate import AGGREGATES
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.building import REWARDS
from bpgo_video.rewards.suite import RewardSuite, ScoredChunk
from bpgo_video.types import PromptBatch, RolloutChunk

CPU = torch.device("cpu")
MESH = Mesh(0, 1, CPU)
PROMPTS = PromptBatch(torch.tensor([5, 6]), ("first", "second"), {})


class Row:
    """A reward that returns what the test wants."""

    name, version, range = "row", "1", (0.0, 1.0)
    higher_is_better, differentiable, kind, frames = True, False, "test", FrameSampling()

    def __init__(self, low: float = 0.0, columns: int = 3) -> None:
        self.low, self.columns = low, columns

    def __call__(self, clips: Clips) -> FrameScores:
        values = self.low + clips.videos.mean(dim=(2, 3, 4))[:, : self.columns]
        return FrameScores(values, clips.times[: self.columns])


class LowerIsBetter(Row):
    higher_is_better = False


def suite(**rewards: RewardConfig) -> RewardSuite:
    return RewardSuite(rewards, CPU, fps=2.0)


def chunk_of(videos: torch.Tensor) -> RolloutChunk:
    """Two samples of each of the two prompts."""
    return RolloutChunk((), videos, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))


def own(name: str, **keys: object) -> RewardConfig:
    return RewardConfig(model=f"tests.rewards.test_reward_suite:{name}", **keys)


def test_scores_are_aggregated_weighted_and_oriented() -> None:
    videos = torch.zeros(4, 3, 3, 2, 2)
    videos[1, 0] = 0.9
    both = suite(mean=own("Row", weight=2.0), worst=own("LowerIsBetter", aggregate="min"))
    rewards = both.gather([both.score(chunk_of(videos), PROMPTS)], PROMPTS, 2, MESH)
    torch.testing.assert_close(rewards.by_name["mean"], torch.tensor([[0.0, 0.3], [0.0, 0.0]]))
    torch.testing.assert_close(rewards.by_name["worst"], torch.tensor([[0.0, -0.9], [0.0, 0.0]]))
    torch.testing.assert_close(rewards.total, torch.tensor([[0.0, -0.3], [0.0, 0.0]]))
    torch.testing.assert_close(rewards.per_frame["mean"][0, 1], torch.tensor([0.9, 0.0, 0.0]))
    assert rewards.frame_times["mean"].tolist() == [0.0, 0.5, 1.0]


def test_videos_are_scored_again_by_other_options_where_asked() -> None:
    videos = torch.zeros(4, 3, 3, 2, 2)
    videos[1, 0] = 0.9
    config = own("LowerIsBetter", options={"low": 0.1}, second={"columns": 1})
    twice = RewardSuite({"row": config}, CPU, fps=2.0, twice=True)
    rewards = twice.gather([twice.score(chunk_of(videos), PROMPTS)], PROMPTS, 2, MESH)
    torch.testing.assert_close(rewards.by_name["row"], torch.tensor([[-0.1, -0.4], [-0.1, -0.1]]))
    torch.testing.assert_close(rewards.second["row"], torch.tensor([[-0.1, -1.0], [-0.1, -0.1]]))
    some = replace(PROMPTS, twice=torch.tensor([True, False]))
    partly = twice.gather([twice.score(chunk_of(videos), some)], some, 2, MESH).second["row"]
    torch.testing.assert_close(partly, torch.tensor([[-0.1, -1.0], [torch.nan] * 2]), equal_nan=True)
    once = suite(row=config)
    assert not once.gather([once.score(chunk_of(videos), PROMPTS)], PROMPTS, 2, MESH).second


def test_a_nan_names_reward_prompt_and_sample() -> None:
    broken = suite(row=own("Row"))
    scores = torch.zeros(4, 3)
    scores[3, 1] = torch.nan
    rows, samples = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    with pytest.raises(RewardError, match=r"'row' scored nan for sample 1 of prompt 'second' \(id 6\), scored frame 1"):
        broken.gather([ScoredChunk(rows, samples, {"row": FrameScores(scores)})], PROMPTS, 2, MESH)


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(RewardError, match=r"'row' on samples 0, 1 of prompt 'first'.* returned the shape \(4, 0\)"):
        suite(row=own("Row", options={"columns": 0})).score(chunk_of(torch.zeros(4, 3, 3, 2, 2)), PROMPTS)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (RewardConfig(model="clip_scroe"), "must be one of"),
        (RewardConfig(model="tests.nowhere:Reward"), "could not be built"),
        (
            own("Row", options={"colour": 1}),
            r"unexpected keyword argument 'colour'; its options are \['low', 'columns'\]",
        ),
        (own("Row", second={"colour": 1}), "unexpected keyword argument 'colour'"),
        (
            RewardConfig("clip_score", options={"mdoel": "x"}),
            r"missing a required argument: 'model'; its options are \['model', 'frames', .*'dtype'\]",
        ),
    ],
)
def test_a_reward_that_cannot_be_built_says_why(reward: RewardConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        suite(only=reward)


@pytest.mark.parametrize(
    ("aggregate", "at", "expected"),
    [
        ("mean", 0.0, 2.5),
        ("min", 0.0, 1.0),
        ("soft_min", 1e-4, 1.0),
        ("soft_min", 1e4, 2.5),
        ("soft_min", 0.5, -0.5 * math.log((math.exp(-2) + math.exp(-4) + math.exp(-6) + math.exp(-8)) / 4)),
        ("top_share", 0.5, 3.5),
        ("top_share", 0.01, 4.0),
        ("share_above", 1.5, 0.75),
    ],
)
def test_frames_become_a_video_s_score(aggregate: str, at: float, expected: float) -> None:
    rows = torch.tensor([[4.0, 1.0, 3.0, 2.0]], dtype=torch.float64)
    assert AGGREGATES[aggregate](rows, at).item() == pytest.approx(expected, abs=2e-4)


def test_a_threshold_is_stated_in_the_model_s_own_units() -> None:
    videos = torch.zeros(4, 3, 3, 2, 2)
    videos[1, 0] = 0.9  # of three frames one is above .5: two are better where lower is better
    dark = suite(dark=own("LowerIsBetter", aggregate="share_above", aggregate_at=0.5))
    rewards = dark.gather([dark.score(chunk_of(videos), PROMPTS)], PROMPTS, 2, MESH)
    torch.testing.assert_close(rewards.by_name["dark"], torch.tensor([[1.0, 2 / 3], [1.0, 1.0]]))


def test_the_version_follows_the_aggregate() -> None:
    versions = {
        suite(row=own("Row", **keys)).versions["row"]
        for keys in ({}, {"aggregate": "min"}, *({"aggregate": "top_share", "aggregate_at": at} for at in (0.1, 0.2)))
    }
    assert len(versions) == 4


def test_what_a_model_computed_of_clips_is_kept_for_others() -> None:
    clips, calls = Clips(torch.zeros(1, 2, 3, 4, 4), 8.0, ("",)), []
    for key in ("clip", "clip", "dino"):
        assert clips.once(key, lambda key=key: calls.append(key) or len(calls)) == len(calls)
    assert calls == ["clip", "dino"]


def test_scores_and_their_times_agree() -> None:
    class Untimed(Row):
        def __call__(self, clips: Clips) -> FrameScores:
            return FrameScores(super().__call__(clips).values)

    broken = suite(row=own("Row"))
    object.__setattr__(broken.rewards["row"], "model", Untimed())
    with pytest.raises(RewardError, match="returned 3 scores a video with no frame times"):
        broken.score(chunk_of(torch.zeros(4, 3, 3, 2, 2)), PROMPTS)


@pytest.mark.parametrize("name", REWARDS)
def test_every_registered_reward_exists_and_is_documented(name: str) -> None:
    module, _, attribute = REWARDS[name].partition(":")
    stated = getattr(getattr(importlib.import_module(module), attribute), "name", name)  # a worker's is its model's
    assert stated == name
    assert f"`{name}`" in (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
