"""The surrogate world against closed forms: rewards, their unit, gradients, and how judges err."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal

from bpgo_video.config.learner import LossConfig
from bpgo_video.learner.agreement import frame_agreement
from bpgo_video.learner.losses import PolicyShift, clipped_surrogate
from bpgo_video.study.draws import Draws
from bpgo_video.study.judges import LEVEL, Judge, make_judge
from bpgo_video.study.preregistration import Regime
from bpgo_video.study.world import World, make_world, normal
from tests.study.small import registered

SIZES = replace(registered().world, steps=1, prompts_per_step=10, group_size=4000, prompts=10)


@pytest.fixture
def world() -> World:
    return make_world(SIZES, SIZES.prompts, seed=3)


@pytest.fixture
def draws() -> Draws:
    return Draws(SIZES, SIZES.prompts, seed=3)


def judge_of(world: World, regime: Regime, index: int = 0) -> Judge:
    return make_judge(world, regime, SIZES, 3, index)


def errors(world: World, draws: Draws, regime: Regime, scoring: int = 0) -> tuple[Judge, torch.Tensor]:
    """Scores of videos minus true rewards at the start: prompts in the order of their numbers x group."""
    judge, rows = judge_of(world, regime), torch.arange(SIZES.prompts)
    samples = world.samples(world.start(), rows, draws.noise[0])
    scores = judge.frames(rows, samples, draws.scoring(0, 0, scoring)).mean(dim=2)
    return judge, scores - world.reward(rows, samples) - LEVEL


def test_rewards_have_their_expectation_and_deviate_by_one_at_the_start(world: World) -> None:
    theta, rows = 0.3 * normal((SIZES.features, SIZES.latents), torch.Generator().manual_seed(0)), torch.arange(10)
    noise = normal((10, 100_000, SIZES.latents), torch.Generator().manual_seed(1))
    rewards = world.reward(rows, world.samples(theta, rows, noise))
    error = rewards.std(dim=1) / rewards.shape[1] ** 0.5
    assert ((rewards.mean(dim=1) - world.expected_reward(theta)).abs() < 5 * error).all()
    at_start = world.reward(rows, world.samples(world.start(), rows, noise))
    torch.testing.assert_close(at_start.std(dim=1), torch.ones(10, dtype=torch.float64), atol=0.02, rtol=0)
    assert world.expected_reward(world.start()).abs().max() < 1e-12


def test_the_gradient_is_that_of_the_projects_clipped_surrogate(world: World, draws: Draws) -> None:
    rows, noise = draws.order[0], draws.noise[0][:, :8]
    advantage = normal((10, 8), torch.Generator().manual_seed(2))
    theta = world.start().requires_grad_()
    samples = world.samples(theta.detach(), rows, noise)
    means = (world.features[rows] @ theta)[:, None]
    log_prob = Normal(means, world.sigma).log_prob(samples).sum(dim=2).flatten()
    loss = clipped_surrogate(PolicyShift(log_prob - log_prob.detach()), advantage.flatten(), LossConfig()).mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(world.surrogate_gradient(rows, noise, advantage), gradient)


def test_true_rewards_as_advantages_climb_the_expected_reward(world: World, draws: Draws) -> None:
    """The policy gradient theorem: E of the surrogate's gradient is minus the gradient of the expected reward."""
    rows, noise = draws.order[0], draws.noise[0]
    theta = world.start().requires_grad_()
    (expected,) = torch.autograd.grad(world.expected_reward(theta)[rows].mean(), theta)
    rewards = world.reward(rows, world.samples(theta.detach(), rows, noise))
    found = -world.surrogate_gradient(rows, noise, rewards)
    cosine = (found * expected).sum() / (found.norm() * expected.norm())
    assert cosine > 0.99
    assert found.norm() / expected.norm() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_noise_has_the_stated_deviation_whatever_frames_share(world: World, draws: Draws, share: float) -> None:
    judge, found = errors(world, draws, Regime(noise=(0.5, 4.0), shared=share))
    assert int(judge.ambiguous.sum()) == 5
    torch.testing.assert_close(found.std(dim=1), judge.of_prompts((0.5, 4.0), torch.arange(10)), atol=0, rtol=0.06)
    other = errors(world, draws, Regime(noise=(0.5, 4.0), shared=share), scoring=1)[1]
    assert torch.corrcoef(torch.stack([found.flatten(), other.flatten()]))[0, 1].abs() < 0.02


def test_frames_see_the_noise_that_they_do_not_share(world: World, draws: Draws) -> None:
    rows = torch.arange(10)
    samples = world.samples(world.start(), rows, draws.noise[0])
    for shared, rho in ((0.0, 1 / (1 + 16)), (1.0, 1.0)):
        judge = replace(judge_of(world, Regime(noise=(4.0, 4.0), shared=shared)), frame_std=0.0)
        agreement = frame_agreement(judge.frames(rows, samples, draws.scoring(0, 0, 0)))
        torch.testing.assert_close(agreement, torch.full((10,), rho, dtype=torch.float64), atol=0.1, rtol=0)


def test_judges_err_as_their_regime_states(world: World, draws: Draws) -> None:
    judge, found = errors(world, draws, Regime(interpretation=4.0))
    assert found[~judge.ambiguous].abs().max() < 1e-9
    torch.testing.assert_close(
        found[judge.ambiguous].square().mean(dim=1).sqrt(), torch.full((5,), 4.0).double(), rtol=0.05, atol=0
    )
    judge, found = errors(world, draws, Regime(bias=4.0))
    torch.testing.assert_close(found, judge.bias[:, None].expand_as(found))
    judge, found = errors(world, draws, Regime(hack=0.3))
    torch.testing.assert_close(found.std(dim=1), torch.full((10,), 0.3).double(), rtol=0.06, atol=0)
    judge, found = errors(world, draws, Regime(outliers=(0.0, 0.2)))
    assert found[~judge.ambiguous].abs().max() < 1e-9
    variance = 16.0**2 * 0.2 / SIZES.frames
    torch.testing.assert_close(found[judge.ambiguous].var(dim=1), torch.full((5,), variance).double(), rtol=0.1, atol=0)
    judge, found = errors(world, draws, Regime(misleading=-4.0))
    assert found[judge.ambiguous].mean() == pytest.approx(-4.0, abs=0.1)  # its targets earn 0 at the start too


def test_saturated_scores_keep_the_order_and_stay_below_their_bound(world: World) -> None:
    rows, judge = torch.arange(10), judge_of(world, Regime(saturation=0.5))
    at = torch.linspace(-0.5, 1, 31)[None, :, None] * world.targets[:, None]
    scores = judge.opinion(rows, at) - LEVEL
    assert (scores.diff(dim=1) > 0).all()
    assert (scores < 0.5 * world.highest[:, None]).all()
    low = world.reward(rows, at)
    torch.testing.assert_close(scores[low < 0], low[low < 0])


def test_a_second_judge_errs_elsewhere(world: World) -> None:
    first, second = (judge_of(world, Regime(noise=(0.5, 4.0)), index) for index in (0, 1))
    assert not torch.equal(first.ambiguous, second.ambiguous)
    assert float(first.tilt.norm()) == 0 < float(second.tilt.norm())


def test_prompts_come_back_in_rounds_or_once() -> None:
    sizes = replace(SIZES, steps=5, prompts_per_step=4, group_size=2)
    assert sorted(Draws(sizes, 10, 0).order.flatten()[:10].tolist()) == list(range(10))
    assert sorted(Draws(sizes, 20, 0).order.flatten().tolist()) == list(range(20))
