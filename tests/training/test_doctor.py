"""The doctor's verdict on the ratios of a replay, the command that it names, and the progress line's values."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock, PropertyMock, patch

import pytest
import torch

from bpgo_video.cli import typed
from bpgo_video.config.bpgo import Config, RewardConfig
from bpgo_video.training.doctor import Examination, dependent_measure, ratio_is_one
from bpgo_video.training.loop import Stopwatch
from bpgo_video.training.rl import keys_of
from bpgo_video.training.session import Session
from bpgo_video.types import Loss, PromptBatch, Trajectory


@pytest.mark.parametrize(
    ("lowest", "highest", "holds", "words"),
    [
        (1.0, 1.0, True, "exactly 1"),
        (1 - 5e-5, 1 + 1e-6, True, "well inside"),
        (1.0, 1 + 5e-4, False, "off 1 by up to 0.0005"),
        (float("nan"), float("nan"), False, "off 1 by up to nan"),
    ],
)
def test_a_ratio_is_judged_by_the_clip_range_and_nan_fails(
    recipe: Config, lowest: float, highest: float, holds: bool, words: str
) -> None:
    exact, seen = ({"ratio_min": torch.tensor(low), "ratio_max": torch.tensor(high)} for low, high in
                   ((1.0, 1.0), (lowest, highest)))  # fmt: skip
    objective = Mock()
    objective.passes.return_value = (0, 1, 2)
    objective.arranged = lambda trajectories, mesh: (objective, trajectories)
    objective.parts = lambda trajectory, index: [trajectory]
    objective.loss.side_effect = [Loss(torch.zeros(()), metrics) for metrics in (exact, seen, exact)]
    session = Mock(spec=Session, config=recipe)
    examination = Examination(session, Mock(spec=PromptBatch), Mock(spec=Stopwatch), [Mock(spec=Trajectory)])
    with patch.object(Examination, "objective", PropertyMock(return_value=objective)):
        held, explanation = ratio_is_one(examination)
    assert held is holds
    assert words in explanation


@pytest.mark.parametrize(
    ("on_this_host", "expected"),
    [
        (2, "bpgo-video train 'my recipe.yaml' --run.seed 3 --ranks 2"),
        (1, "deepspeed --hostfile HOSTS --module bpgo_video train 'my recipe.yaml' --run.seed 3"),
    ],
)
def test_the_command_to_type_has_the_ranks_that_run_now(
    on_this_host: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_this_host))
    assert typed("train", ["my recipe.yaml", "--run.seed", "3"]) == expected


def test_a_measure_that_scores_with_a_training_rewards_weights_is_warned_of(recipe: Config) -> None:
    weights = recipe.rewards["alignment"].options["model"]
    assert dependent_measure(recipe) == []
    same = RewardConfig("clip_image_score", options={"model": weights, "frames": 2})

    def measured(**rewards: RewardConfig) -> list[str]:
        return dependent_measure(replace(recipe, evaluation=replace(recipe.evaluation, rewards=rewards)))

    (words,) = measured(again=same, oracle=RewardConfig("shapes_oracle"))
    assert "evaluation.rewards.again" in words
    assert f"scores with {weights}, as training reward alignment" in words
    assert measured(oracle=RewardConfig("shapes_oracle"), again=same) == [], (
        "a second one of the same network may follow"
    )
    assert measured() == []


def test_the_progress_line_shows_trust_where_the_recipe_has_one(recipe: Config) -> None:
    assert list(keys_of(recipe).shown) == ["reward", "trust_mean"]
    plain = replace(recipe, bpgo=replace(recipe.bpgo, alpha=0.0))
    assert list(keys_of(plain).shown) == ["reward"]
    assert keys_of(plain).required == keys_of(recipe).required
