"""A suite of rewards: plugged in by path, oriented, and loud where one fails."""

from __future__ import annotations

import pytest
import torch

from bpgo_video.config import ConfigError, RewardConfig
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.rewards.base import RewardError, RewardSuite, ScoredChunk
from bpgo_video.types import PromptBatch, RolloutChunk

CPU = torch.device("cpu")
MESH = Mesh(0, 1, CPU)
PROMPTS = PromptBatch(torch.tensor([5, 6]), ("first", "second"), {})


class Row:
    """A reward that returns what the test wants."""

    name, version, range = "row", "1", (0.0, 1.0)
    higher_is_better, differentiable, kind = True, False, "test"

    def __init__(self, low: float = 0.0, columns: int = 3) -> None:
        self.low, self.columns = low, columns

    def __call__(self, videos: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return self.low + videos.mean(dim=(2, 3, 4))[:, : self.columns]


class LowerIsBetter(Row):
    higher_is_better = False


def suite(**rewards: RewardConfig) -> RewardSuite:
    return RewardSuite(rewards, CPU)


def chunk_of(videos: torch.Tensor) -> RolloutChunk:
    """Two samples of each of the two prompts."""
    return RolloutChunk((), videos, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))


def own(name: str, **keys: object) -> RewardConfig:
    return RewardConfig(model=f"tests.test_reward_suite:{name}", **keys)


def test_scores_are_aggregated_weighted_and_oriented() -> None:
    videos = torch.zeros(4, 3, 3, 2, 2)
    videos[1, 0] = 0.9
    both = suite(mean=own("Row", weight=2.0), worst=own("LowerIsBetter", aggregate="min"))
    rewards = both.gather([both.score(chunk_of(videos), PROMPTS.texts)], PROMPTS, 2, MESH)
    torch.testing.assert_close(rewards.by_name["mean"], torch.tensor([[0.0, 0.3], [0.0, 0.0]]))
    torch.testing.assert_close(rewards.by_name["worst"], torch.tensor([[0.0, -0.9], [0.0, 0.0]]))
    torch.testing.assert_close(rewards.total, torch.tensor([[0.0, -0.3], [0.0, 0.0]]))
    assert rewards.per_frame["mean"].shape == (2, 2, 3)


def test_videos_are_scored_again_by_other_options_where_asked() -> None:
    videos = torch.zeros(4, 3, 3, 2, 2)
    videos[1, 0] = 0.9
    config = own("LowerIsBetter", options={"low": 0.1}, second={"columns": 1})
    twice = RewardSuite({"row": config}, CPU, twice=True)
    rewards = twice.gather([twice.score(chunk_of(videos), PROMPTS.texts)], PROMPTS, 2, MESH)
    torch.testing.assert_close(rewards.by_name["row"], torch.tensor([[-0.1, -0.4], [-0.1, -0.1]]))
    torch.testing.assert_close(rewards.second["row"], torch.tensor([[-0.1, -1.0], [-0.1, -0.1]]))
    once = suite(row=config)
    assert not once.gather([once.score(chunk_of(videos), PROMPTS.texts)], PROMPTS, 2, MESH).second


def test_a_nan_names_reward_prompt_and_sample() -> None:
    broken = suite(row=own("Row"))
    scores = torch.zeros(4, 3)
    scores[3, 1] = torch.nan
    rows, samples = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    with pytest.raises(RewardError, match=r"'row' scored nan for sample 1 of prompt 'second' \(id 6\), scored frame 1"):
        broken.gather([ScoredChunk(rows, samples, {"row": scores})], PROMPTS, 2, MESH)


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(RewardError, match=r"'row' returned the shape \(4, 0\)"):
        suite(row=own("Row", options={"columns": 0})).score(chunk_of(torch.zeros(4, 3, 3, 2, 2)), PROMPTS.texts)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (RewardConfig(model="clip_scroe"), "must be one of"),
        (RewardConfig(model="tests.nowhere:Reward"), "could not be built"),
        (own("Row", options={"colour": 1}), "unexpected keyword"),
    ],
)
def test_a_reward_that_cannot_be_built_says_why(reward: RewardConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        suite(only=reward)
