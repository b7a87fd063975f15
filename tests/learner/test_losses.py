"""The total loss: values by hand, gradients, and equality with GRPO's loss where BPGO is off."""

import math
import statistics

import pytest
import torch

from bpgo_video.config.learner import BPGOConfig, LossConfig
from bpgo_video.diffusion.sde import SAMPLERS, steps_of
from bpgo_video.learner.advantages import group_relative
from bpgo_video.learner.bpgo import step_advantages
from bpgo_video.learner.losses import (
    PolicyShift,
    bpgo_loss,
    clipped_surrogate,
    divergence_masked_surrogate,
    with_spread,
)
from bpgo_video.types import PriorAnchor


def anchor(prior, scale=1.0):
    return {"clip": PriorAnchor(prior, torch.ones_like(prior), torch.full(prior.shape, 8), scale, "test")}


def clip(low, high):
    return LossConfig(clip_range=(low, high))


def per_sample(result):
    """Advantages of prompts x group as vectors over samples, in prompt-major order."""
    contrastive = None if result.contrastive is None else result.contrastive.flatten()
    return result.advantage.flatten(), contrastive


def test_clipped_surrogate_equals_values_computed_by_hand():
    # clip (.1, .2): ratio clamped to [.9, 1.2]; the minimum keeps the pessimistic side
    ratio = torch.tensor([1.3, 1.3, 0.8, 0.8, 1.05], dtype=torch.float64)
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0], dtype=torch.float64)
    # min(2.6, 2.4), min(-2.6, -2.4), min(1.6, 1.8), min(-1.6, -1.8), 2.1, each with its sign flipped
    expected = torch.tensor([-2.4, 2.6, -1.6, 1.8, -2.1], dtype=torch.float64)
    torch.testing.assert_close(clipped_surrogate(PolicyShift(ratio.log()), advantage, clip(0.1, 0.2)), expected)


def test_total_loss_equals_values_computed_by_hand():
    # R = 0, 1, 2; prior .5, s_ref 1, alpha .5, k 1, lambda 1, zeta .4; u = -.5, .5, 1.5
    # w = 1 + .5 tanh(.25); A = (-1, 0, 1)/(1 + 1e-6); R~ = -.5 e^-.5, 1.5 e^.5, 2.5 e^1.5
    rewards, prior = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    result = step_advantages({"clip": rewards}, anchor(prior), {"clip": 1.0}, BPGOConfig(zeta=0.4))
    log_prob = torch.tensor([1.2, 0.8, 1.3], dtype=torch.float64).log()
    loss = bpgo_loss(PolicyShift(log_prob), *per_sample(result), 0.4, clip(0.1, 0.25))

    w, a = 1 + 0.5 * math.tanh(0.25), 1 / (1 + 1e-6)
    transformed = [-0.5 * math.exp(-0.5), 1.5 * math.exp(0.5), 2.5 * math.exp(1.5)]
    mean, std = statistics.mean(transformed), statistics.stdev(transformed)
    b = [a * (value - mean) / (std + 1e-6) for value in transformed]  # with the noise floor of A: R has std 1
    assert b[0] < b[1] < 0 < b[2]
    first = [1.2 * a, 0.0, -1.25 * a]  # ratio 1.2 is not clipped for A < 0; 1.3 is clamped to 1.25 for A > 0
    second = [-1.2 * b[0], -0.9 * b[1], -1.25 * b[2]]  # ratio .8 is clamped to .9 for A~ < 0
    expected = sum(w * one + 0.4 * two for one, two in zip(first, second, strict=True)) / 3
    assert loss.value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("clip_range", [(1e-3, 1e-3), (0.2, 0.3)])
def test_alpha_and_zeta_zero_are_grpo_bit_for_bit(clip_range):
    rng = torch.Generator().manual_seed(5)
    rewards, old = torch.randn(4, 6, generator=rng), torch.randn(24, generator=rng)
    values, gradients = [], []
    for learner in ("bpgo", "grpo"):
        log_prob = (old + 1e-2 * torch.randn(24, generator=torch.Generator().manual_seed(6))).requires_grad_()
        if learner == "bpgo":
            settings = BPGOConfig(alpha=0.0, zeta=0.0)
            result = step_advantages({"clip": rewards}, {}, {"clip": 1.0}, settings)
            value = bpgo_loss(PolicyShift(log_prob - old), *per_sample(result), settings.zeta, clip(*clip_range)).value
        else:
            ratio, advantage = torch.exp(log_prob - old), group_relative(rewards).flatten()
            low, high = 1 - clip_range[0], 1 + clip_range[1]
            value = -torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage).mean()
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, log_prob)[0])
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("sampler", ["flow_sde", "cps"])
def test_gradient_equals_finite_differences(form, sampler):
    prompts, group, shape = 3, 4, (12, 2, 1, 2, 2)
    rng = torch.Generator().manual_seed(7)
    latents, noise = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    rewards = torch.randn(prompts, group, generator=rng, dtype=torch.float64)
    prior, settings = torch.tensor([-0.5, 0.1, 0.9], dtype=torch.float64), BPGOConfig(form=form)
    result = step_advantages({"clip": rewards}, anchor(prior), {"clip": 1.0}, settings)
    step = steps_of(torch.linspace(1, 0, 6))[2]

    def transition(theta):
        return SAMPLERS[sampler](theta[0] * latents + theta[1] * latents.tanh() + theta[2], latents, step, 0.7)

    behaviour = transition(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
    next_latents = behaviour.sample(noise)
    old = behaviour.log_prob(next_latents)

    def loss(theta):
        log_prob = transition(theta).log_prob(next_latents)
        return bpgo_loss(PolicyShift(log_prob - old), *per_sample(result), settings.zeta, clip(0.02, 0.02))

    theta = torch.tensor([0.5, -0.1, 0.2], dtype=torch.float64, requires_grad=True)
    assert 0 < loss(theta).metrics["clip_fraction"] < 1  # both sides of the clip are tested
    gradient = torch.autograd.grad(loss(theta).value, theta)[0]
    for i in range(3):
        h = torch.zeros(3, dtype=torch.float64).index_fill_(0, torch.tensor(i), 1e-6)
        difference = (loss(theta.detach() + h).value - loss(theta.detach() - h).value) / 2e-6
        assert gradient[i].item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-9)
        assert gradient[i] != 0


@pytest.mark.parametrize("group", [6, 8, 12, 24])
@pytest.mark.parametrize("form", ["paper", "released"])
def test_equal_rewards_give_exactly_zero_gradient(group, form):
    rewards, prior = torch.tensor([0.1, 0.27, 1 / 3])[:, None].repeat(1, group), torch.full((3,), 0.2)
    settings = BPGOConfig(form=form)
    result = step_advantages({"clip": rewards}, anchor(prior, 0.02), {"clip": 1.0}, settings)
    rng = torch.Generator().manual_seed(8)
    old = torch.randn(3 * group, generator=rng)
    log_prob = (old + 0.01 * torch.randn(3 * group, generator=rng)).requires_grad_()
    loss = bpgo_loss(PolicyShift(log_prob - old), *per_sample(result), settings.zeta, clip(1e-3, 1e-3))
    loss.value.backward()
    assert torch.equal(log_prob.grad, torch.zeros_like(log_prob))


def test_trust_in_the_advantage_is_trust_times_the_surrogate():
    """Eq 3: surr(r, w A) = w surr(r, A) for w > 0, on both sides of the clip, in value and gradient."""
    rng = torch.Generator().manual_seed(2)
    advantage, log_prob = (torch.randn(64, generator=rng, dtype=torch.float64) for _ in range(2))
    log_prob = (0.2 * log_prob).requires_grad_()
    trust = torch.rand(64, generator=rng, dtype=torch.float64) + 0.5
    within = clipped_surrogate(PolicyShift(log_prob), trust * advantage, clip(0.1, 0.2))
    outside = trust * clipped_surrogate(PolicyShift(log_prob), advantage, clip(0.1, 0.2))
    torch.testing.assert_close(within, outside)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), log_prob)[0] for loss in (within, outside)))


def test_the_two_surrogates_are_clipped_separately():
    # At ratio 1.3, A = 1 is clipped and A~ = -1 is not: the gradient is zeta * 1.3. The merged advantage
    # 1 - .5 = .5 would be clipped: no gradient.
    log_prob = torch.tensor([math.log(1.3)], dtype=torch.float64, requires_grad=True)
    one, old = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    loss = bpgo_loss(PolicyShift(log_prob - old), 1.2 * one, -one, 0.5, clip(0.2, 0.2))
    assert loss.value.item() == pytest.approx(-1.2 * 1.2 + 0.5 * 1.3)
    assert torch.autograd.grad(loss.value, log_prob)[0].item() == pytest.approx(0.5 * 1.3)


def test_on_the_first_update_the_gradient_is_the_weighted_advantage():
    rng = torch.Generator().manual_seed(9)
    old, advantage, contrastive = (torch.randn(8, generator=rng) for _ in range(3))
    log_prob = old.clone().requires_grad_()
    loss = bpgo_loss(PolicyShift(log_prob - old), advantage, contrastive, 0.3, clip(1e-5, 1e-5))
    loss.value.backward()
    torch.testing.assert_close(log_prob.grad, -(advantage + 0.3 * contrastive) / 8)
    assert [loss.metrics[f"ratio_{name}"].item() for name in ("mean", "squared_error", "min", "max")] == [1, 0, 1, 1]
    assert loss.metrics["clip_fraction"] == loss.metrics["approx_kl"] == loss.metrics["log_ratio_abs_max"] == 0


def test_metrics_equal_values_computed_by_hand():
    log_prob = torch.tensor([0.1, -0.2, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(4, dtype=torch.float64)
    metrics = bpgo_loss(PolicyShift(log_prob), zeros, None, 0.0, clip(0.15, 0.15)).metrics
    assert metrics["clip_fraction"] == 0.25  # exp(.1) = 1.105 is inside, exp(-.2) = .819 is not
    assert metrics["log_ratio_abs_max"].item() == pytest.approx(0.2)
    assert metrics["approx_kl"].item() == pytest.approx((0.01 + 0.04) / 8)
    assert metrics["ratio_mean"].item() == pytest.approx((math.exp(0.1) + math.exp(-0.2) + 2) / 4)
    assert not any(value.requires_grad for value in metrics.values())


def test_a_policy_whose_ratios_all_underflow_has_no_effective_samples():
    log_ratio = torch.full((4,), -1e4, dtype=torch.float64)
    metrics = bpgo_loss(PolicyShift(log_ratio), torch.ones(4), None, 0.0, clip(0.1, 0.1)).metrics
    found = with_spread({name: float(value) for name, value in metrics.items()})
    assert (found["effective_samples"], found["ratio_std"]) == (0, 0)


def test_errors_name_the_value():
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"zeta=0\.5 but no contrastive"):
        bpgo_loss(PolicyShift(one), one, None, 0.5, clip(0.1, 0.1))
    with pytest.raises(ValueError, match="clip_range"):
        clip(-0.1, 0.1)
    with pytest.raises(ValueError, match=r"loss\.ratio guard compares the means"):
        clipped_surrogate(PolicyShift(one), one, LossConfig(ratio="guard"))


def test_the_divergence_mask_equals_values_computed_by_hand():
    # limit .01: samples beyond it count only if they move back towards the old policy
    log_ratio = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.1], dtype=torch.float64, requires_grad=True)
    divergence = torch.tensor([0.02, 0.02, 0.01, 0.02, 0.009], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    move = PolicyShift(log_ratio, divergence, torch.tensor(1.0, dtype=torch.float64))
    loss = divergence_masked_surrogate(
        move, advantage, LossConfig(trust_region="divergence_mask", divergence_limit=0.01)
    )
    up, down = math.exp(0.1), math.exp(-0.1)
    torch.testing.assert_close(loss, torch.tensor([0.0, up, 0.0, -down, -up], dtype=torch.float64))
    gradient = torch.autograd.grad(loss.sum(), log_ratio)[0]
    torch.testing.assert_close(gradient, loss.detach())  # d(r A)/d log r = r A, and 0 where masked


def test_the_guard_ratio_is_centred_with_the_same_std_at_every_noise_level():
    rng = torch.Generator().manual_seed(3)
    spreads = []
    for std in (0.05, 0.8):
        change = 1e-2 * torch.ones(1, dtype=torch.float64)  # of the mean, the same at both noise levels
        noise = torch.randn(200_000, generator=rng, dtype=torch.float64)
        log_ratio = -((std * noise - change) ** 2 - (std * noise) ** 2) / (2 * std**2)
        divergence = (change**2 / (2 * std**2)).expand_as(log_ratio)
        move = PolicyShift(log_ratio, divergence, torch.tensor(std, dtype=torch.float64))
        normalised = LossConfig(ratio="guard")
        loss = clipped_surrogate(move, torch.ones_like(log_ratio), normalised)
        assert loss.shape == log_ratio.shape
        found = std * (log_ratio + divergence)
        assert abs(found.mean()) < 1e-4
        assert log_ratio.mean().item() == pytest.approx(-divergence[0].item(), abs=5 * (change / std).item() / 447)
        spreads.append(found.std().item())
    assert spreads[0] == pytest.approx(spreads[1], rel=0.02)
