"""Reward suites: construction by dotted path, aggregation, gathering, and errors that name the reward."""

from __future__ import annotations

import math
import pkgutil
from dataclasses import replace

import pytest
import torch

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.rewards import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.reward import AGGREGATES, REWARDS
from bpgo_video.rewards.suite import RewardSuite, ScoredChunk
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk
from tests.made.recipes import ROOT
from tests.rewards.toys import CPU, MESH, PROMPTS, suite_of, toy

VIDEOS = torch.zeros(4, 3, 3, 2, 2)  # two samples of each prompt, of which only the second is bright
VIDEOS[1, 0] = 0.9
CHUNK = RolloutChunk((), VIDEOS, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))


def rewards_of(suite: RewardSuite, prompts: PromptBatch = PROMPTS) -> Rewards:
    return suite.gather([suite.score(CHUNK, prompts)], prompts, 2, MESH)


def test_scores_are_aggregated_weighted_and_negated_where_lower_is_better() -> None:
    both = {"mean": toy("Brightness", weight=2.0), "worst": toy("Darkness", aggregate="min")}
    rewards = rewards_of(RewardSuite(both, CPU, fps=2.0))
    torch.testing.assert_close(rewards.by_name["mean"], torch.tensor([[0.0, 0.3], [0.0, 0.0]]))
    torch.testing.assert_close(rewards.by_name["worst"], torch.tensor([[0.0, -0.9], [0.0, 0.0]]))
    torch.testing.assert_close(rewards.total, torch.tensor([[0.0, -0.3], [0.0, 0.0]]))
    torch.testing.assert_close(rewards.per_frame["mean"][0, 1], torch.tensor([0.9, 0.0, 0.0]))
    assert rewards.frame_times["mean"].tolist() == [0.0, 0.5, 1.0]


def test_videos_are_scored_again_with_other_options_where_requested() -> None:
    keys = {"options": {"low": 0.1}, "rescorings": ({"columns": 1}, {"low": 0.4})}
    several = suite_of("Darkness", **keys)
    first, second = torch.tensor([[-0.1, -0.4], [-0.1, -0.1]]), torch.tensor([[-0.1, -1.0], [-0.1, -0.1]])
    third = torch.tensor([[-0.4, -0.7], [-0.4, -0.4]])
    rewards = rewards_of(several)
    torch.testing.assert_close(rewards.scorings["toy"], torch.stack([first, second, third], dim=2))
    torch.testing.assert_close(rewards.by_name["toy"], (first + second + third) / 3)
    torch.testing.assert_close(rewards.total, rewards.by_name["toy"])
    partly = rewards_of(several, replace(PROMPTS, again=torch.tensor([True, False])))
    torch.testing.assert_close(partly.scorings["toy"][1, :, 1:], torch.full((2, 2), torch.nan), equal_nan=True)
    torch.testing.assert_close(partly.by_name["toy"], torch.stack([rewards.by_name["toy"][0], first[1]]))
    once = rewards_of(suite_of("Darkness", options={"low": 0.1}))
    assert not once.scorings
    assert several.versions == {"toy": "7+7+7"}, "anchors of another number of scorings are stale"
    torch.testing.assert_close(once.by_name["toy"], first)


def test_the_std_of_a_video_is_that_of_the_mean_over_its_frames_and_scorings() -> None:
    rewards = rewards_of(suite_of("Uncertain"))
    torch.testing.assert_close(rewards.stds["toy"], torch.full((2, 2), 0.5 / 3), msg="sqrt(.3^2 + .4^2)/3")
    torch.testing.assert_close(rewards.by_name["toy"], rewards_of(suite_of("Darkness")).by_name["toy"])
    twice = suite_of("Uncertain", rescorings=({"std": (0.0, 0.0, 1.2)},))
    of_both = math.sqrt(0.5**2 + 1.2**2) / 3 / 2
    torch.testing.assert_close(rewards_of(twice).stds["toy"], torch.full((2, 2), of_both))
    partly = rewards_of(twice, replace(PROMPTS, again=torch.tensor([True, False])))
    torch.testing.assert_close(partly.stds["toy"], torch.tensor([[of_both] * 2, [0.5 / 3] * 2]))


def test_only_the_mean_of_frames_has_a_std_and_only_if_the_model_states_it() -> None:
    assert not rewards_of(suite_of("Uncertain", aggregate="min")).stds
    assert not rewards_of(suite_of("Darkness")).stds


@pytest.mark.parametrize(
    ("std", "words"),
    [((0.1, -0.1, 0.1), "a std of -0.1"), ((0.1, math.nan, 0.1), "a std of nan"), ((0.1,) * 2, r"shape \(4, 2\)")],
)
def test_a_std_that_is_none_is_refused_with_the_name_of_the_reward(std: tuple[float, ...], words: str) -> None:
    with pytest.raises(RewardError, match=rf"reward 'toy' on .* returned.* {words}"):
        rewards_of(suite_of("Uncertain", options={"std": std}))


def test_images_are_scored_as_still_videos() -> None:
    images = torch.stack([torch.full((3, 2, 2), 0.25), torch.full((3, 2, 2), 0.5)])
    suite = suite_of("Darkness", aggregate="min")
    assert suite.score_images(PROMPTS, 3, MESH) == {}
    actual = suite.score_images(replace(PROMPTS, images=images), 3, MESH)
    torch.testing.assert_close(actual["toy"], torch.tensor([-0.25, -0.5]))
    assert suite.rewards["toy"].model.received == {"first": 1, "second": 1}


def test_a_nan_names_reward_prompt_and_sample() -> None:
    scores = torch.zeros(4, 3)
    scores[3, 1] = torch.nan
    videos = {"toy": scores.mean(dim=1, keepdim=True)}
    chunk = ScoredChunk(CHUNK.prompt_rows, CHUNK.sample_index, {"toy": FrameScores(scores)}, videos, videos)
    with pytest.raises(RewardError, match=r"'toy' scored nan for sample 1 of prompt 'second' \(id 6\), scored frame 1"):
        suite_of("Brightness").gather([chunk], PROMPTS, 2, MESH)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (RewardConfig(model="clip_scroe"), "perhaps you meant clip_score"),
        (RewardConfig(model="tests.nowhere:Reward"), "could not be built"),
        (toy("Absent"), "could not be built"),
        (
            toy("Brightness", options={"hue": 1}),
            r"unexpected keyword argument 'hue'; its options are \['low', 'columns', 'seconds'\]",
        ),
        (toy("Brightness", rescorings=({"hue": 1},)), "unexpected keyword argument 'hue'"),
        (
            RewardConfig("clip_score", options={"mdoel": "x"}),
            r"missing a required argument: 'model'; its options are \['model', 'frames', .*'dtype'\]",
        ),
    ],
)
def test_a_reward_that_cannot_be_built_is_an_error_with_its_reason(reward: RewardConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardSuite({"only": reward}, CPU, fps=2.0)


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
def test_frame_scores_are_aggregated_to_a_video_score(aggregate: str, at: float, expected: float) -> None:
    rows = torch.tensor([[4.0, 1.0, 3.0, 2.0]], dtype=torch.float64)
    assert AGGREGATES[aggregate](rows, at).item() == pytest.approx(expected, abs=2e-4)


def test_a_threshold_is_stated_in_the_model_s_own_units() -> None:
    """One of three frames is above .5: where lower is better, two count."""
    rewards = rewards_of(suite_of("Darkness", aggregate="share_above", aggregate_at=0.5))
    torch.testing.assert_close(rewards.by_name["toy"], torch.tensor([[1.0, 2 / 3], [1.0, 1.0]]))


def test_the_version_follows_the_aggregate() -> None:
    settings = ({}, {"aggregate": "min"}, *({"aggregate": "top_share", "aggregate_at": at} for at in (0.1, 0.2)))
    assert len({suite_of("Brightness", **keys).versions["toy"] for keys in settings}) == 4


def test_features_of_clips_are_cached_and_a_selection_has_an_empty_cache() -> None:
    clips, calls = Clips(torch.zeros(1, 2, 3, 4, 4), 8.0, ("",)), []
    for key in ("clip", "clip", "dino"):
        assert clips.cached(key, lambda key=key: calls.append(key) or len(calls)) == len(calls)
    assert calls == ["clip", "dino"]
    assert clips.select(slice(0, 1)).cached("clip", lambda: "other") == "other"


def test_frames_are_sampled_evenly_or_per_second() -> None:
    assert FrameSampling(3).indices(9, 8.0) == [0, 4, 8]
    assert FrameSampling().indices(9, 8.0) == list(range(9))
    assert FrameSampling(1).indices(9, 8.0) == [0]
    assert FrameSampling(fps=2.0).indices(10, 8.0) == [0, 4, 8]
    assert FrameSampling(fps=16.0).indices(3, 8.0) == [0, 1, 2]
    for keys in ({"count": 0}, {"fps": -1.0}, {"count": 1, "fps": 1.0}):
        with pytest.raises(ValueError, match=r"must be above 0|give one of them"):
            FrameSampling(**keys)


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_of_the_table_exists_and_is_documented(name: str) -> None:
    stated = getattr(pkgutil.resolve_name(REWARDS[name]), "name", name)  # a worker's is its model's
    assert stated == name
    assert f"`{name}`" in (ROOT / "docs" / "rewards.md").read_text()
