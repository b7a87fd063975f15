"""Arms: what the learner makes of a step's scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bpgo_video.learner.advantages import group_relative
from bpgo_video.learner.agreement import group_icc, spearman_brown
from bpgo_video.study.arms import ArmLearner, shrunk_offset
from bpgo_video.study.judges import make_judge
from bpgo_video.study.preregistration import Arm, Regime
from bpgo_video.study.reliability import SOURCES, Scored, averaged, correlation, ranks
from bpgo_video.study.surrogate import reference_anchors, run_arm, setting
from tests.study.small import registered

SIZES = replace(registered().world, steps=3)
NOISY = Regime(noise=(0.5, 4.0))
REGISTERED = registered()


def learner(arm: Arm, regime: Regime = NOISY, seed: int = 5000) -> ArmLearner:
    world, draws = setting(SIZES, regime.once, seed)
    judges = {f"judge {index}": make_judge(world, regime, SIZES, seed, index) for index in range(arm.judges)}
    return ArmLearner(arm, world, judges, draws, reference_anchors(arm, world, judges, draws))


def first_step(arm: ArmLearner) -> tuple[Scored, torch.Tensor]:
    rows = arm.draws.order[0]
    samples = arm.world.samples(arm.world.start(), rows, arm.draws.noise[0])
    return arm.scored(0, rows, samples), arm.advantage(0, rows, samples)


def test_grpo_is_the_group_relative_advantage_of_one_scoring() -> None:
    scored, advantage = first_step(learner(Arm()))
    assert torch.equal(advantage, group_relative(scored.trained["judge 0"]))


@pytest.mark.parametrize("name", REGISTERED.arms)
def test_every_registered_arm_steps_as_far_as_grpo(name: str) -> None:
    arm = learner(REGISTERED.arms[name])
    scored, advantage = first_step(arm)
    size = group_relative(next(iter(scored.trained.values()))).square().mean()
    torch.testing.assert_close(advantage.square().mean(), size)


@pytest.mark.parametrize("name", REGISTERED.regimes)
def test_every_registered_regime_runs_and_repeats_bit_for_bit(name: str) -> None:
    arm, regime = REGISTERED.arms["mean_reliability_budget"], REGISTERED.regimes[name]
    one, other = (replace(run_arm(SIZES, regime, arm, 0.02, 5000), seconds=0.0) for _ in range(2))
    assert one == other
    assert one.gain == pytest.approx((one.clear + one.ambiguous) / 2)


def test_the_mean_of_two_scorings_trains_with_its_own_reliability() -> None:
    arm = learner(REGISTERED.arms["mean_reliability"])
    rows = arm.draws.order[0]
    samples = arm.world.samples(arm.world.start(), rows, arm.draws.noise[0])
    scored, judge = arm.scored(0, rows, samples), arm.judges["judge 0"]
    both = torch.stack([judge.frames(rows, samples, arm.draws.scoring(0, 0, k)).mean(dim=2) for k in (0, 1)], dim=2)
    torch.testing.assert_close(scored.trained["judge 0"], both.mean(dim=2))
    torch.testing.assert_close(scored.repeated["judge 0"], spearman_brown(group_icc(both), 2))


def test_on_clean_scores_agreement_is_grpo_and_costs_what_it_scores() -> None:
    rate, seed = 0.02, 5000
    grpo = run_arm(SIZES, Regime(), Arm(), rate, seed)
    twice = run_arm(SIZES, Regime(), REGISTERED.arms["mean_reliability"], rate, seed)
    assert twice.gain == pytest.approx(grpo.gain, rel=1e-9)
    assert (grpo.scorings, twice.scorings) == (1, 2)
    # Each prompt of a clean regime agrees with itself, so that a budget scores it twice only when it is new.
    sizes = replace(SIZES, steps=10)
    budget = run_arm(sizes, Regime(), REGISTERED.arms["mean_reliability_budget"], rate, seed)
    assert budget.scorings == pytest.approx(1.5)


def test_the_ceiling_trains_on_the_truth_whatever_the_judge() -> None:
    clean, noisy = (run_arm(SIZES, regime, Arm(trains_on="truth"), 0.02, 5000) for regime in (Regime(), NOISY))
    assert clean.gain == noisy.gain


def test_sources_of_reliability() -> None:
    scores = torch.tensor([[0.0, 1, 2, 3], [0, 10, 20, 30], [3, 2, 1, 0], [1, 1, 1, 1]]).double()
    truth = torch.tensor([[0.0, 1, 2, 3]] * 4).double()
    frames = torch.stack([scores, scores], dim=2)
    scored = Scored({"a": scores}, {"a": frames}, {"a": torch.zeros(4).double()}, truth, torch.rand(4).double())
    assert SOURCES["truth"](scored)["a"].tolist() == pytest.approx([1, 1, 0, 0])
    assert SOURCES["spread_up"](scored)["a"][1] == 1 == SOURCES["spread_down"](scored)["a"][3]
    assert SOURCES["scorings_and_frames"](scored)["a"].tolist() == pytest.approx([0.5, 0.5, 0.5, 0])
    assert SOURCES["random"](scored)["a"] is scored.uniform
    two = replace(scored, trained={"a": scores, "b": torch.stack([2 * scores[0], -scores[0], *scores[2:]])})
    assert SOURCES["judges"](two)["b"].tolist() == pytest.approx([1, 0, 1, 0])
    assert averaged({"a": torch.tensor([0.0, 1]), "b": torch.tensor([1.0, 1])})["a"].tolist() == [0.5, 1]
    assert ranks(torch.tensor([3.0, 1, 2])).tolist() == [1, 0, 0.5]
    assert correlation(scores, truth).tolist() == pytest.approx([1, 1, -1, 0])


def test_the_shrunk_baseline_is_james_steins() -> None:
    rewards = torch.tensor([[0.0, 2], [4, 6], [8, 10], [12, 14]]).double()
    # Means 1, 5, 9, 13 around 7: sum of squares 80. Variances 2, so a mean's is 1: the share is (4 - 3) 1/80.
    expected = torch.tensor([-6.0, -2, 2, 6]).double() / 80 / (2**0.5 + 1e-6)
    torch.testing.assert_close(shrunk_offset(rewards), expected)
    assert shrunk_offset(torch.ones(4, 2).double()).tolist() == [0, 0, 0, 0]
