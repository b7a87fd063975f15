"""Posterior preferences, which are calibrated, and DPO's loss on them."""

from __future__ import annotations

import math

import pytest
import torch

from bpgo_video.config.learner import BPGOConfig
from bpgo_video.learner.advantages import group_relative
from bpgo_video.learner.bpgo import step_advantages
from bpgo_video.learner.preferences import Posterior, dpo_loss, kto_loss, posterior_of

NAN = math.nan


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_posterior_probability_is_the_share_of_pairs_whose_winner_is_truly_better() -> None:
    """Of one reward and of two that err independently; also of pairs chosen as best and worst by the noisy scores."""
    groups, size, weights = 20_000, 4, {"one": 1.0, "two": 0.5}
    rho = {"one": torch.full((groups,), 0.3).double(), "two": torch.full((groups,), 0.6).double()}
    clean = {name: drawn(groups, size, seed=seed) for seed, name in enumerate(weights)}  # t/tau
    observed = {  # A = (t + n)/sqrt(tau^2 + nu^2)
        name: rho[name].sqrt()[:, None] * t + (1 - rho[name]).sqrt()[:, None] * drawn(groups, size, seed=9 + seed)
        for seed, (name, t) in enumerate(clean.items())
    }
    for names in (["one"], ["one", "two"]):
        found = posterior_of({name: observed[name] for name in names}, weights, rho)
        truth = torch.stack([weights[name] * clean[name] for name in names]).sum(dim=0)
        pairs = found.best_against_worst(1)
        right = (truth.gather(1, pairs.winner) > truth.gather(1, pairs.loser)).double()
        for low, high in ((0.5, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.0)):
            inside = (pairs.probability >= low) & (pairs.probability < high)
            error = 4 * float((right[inside].var() / inside.sum()).sqrt())
            assert inside.sum() > 200
            assert float(right[inside].mean()) == pytest.approx(float(pairs.probability[inside].mean()), abs=error)


def test_pairs_equal_values_computed_by_hand() -> None:
    # rho 1/2: mean (A_w - A_l)/sqrt(2), variance 2/2: p = Phi((A_w - A_l)/sqrt(2))
    advantages = torch.tensor([[0.0, 2.0, -1.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    found = posterior_of({"clip": advantages}, {"clip": 1.0}, {"clip": torch.tensor([0.5, 0.5])})
    pairs = found.best_against_worst(2)
    assert pairs.winner[0].tolist() == [1, 3]
    assert pairs.loser[0].tolist() == [2, 0]
    phi = [0.5 * (1 + math.erf(distance / 2)) for distance in (3, 1)]  # Phi(d/sqrt(2))
    assert pairs.probability[0].tolist() == pytest.approx(phi)
    assert pairs.probability[1].isnan().all(), "equal samples are no pair"


def test_without_a_known_reliability_the_labels_are_hard() -> None:
    rewards = drawn(3, 4)
    rewards[1] = 1.0
    posterior = step_advantages({"clip": rewards}, {}, {"clip": 2.0}, BPGOConfig(trust="none", zeta=0.0)).posterior
    assert posterior is not None
    assert posterior.best_against_worst(2).probability.tolist() == [
        [1.0, 1.0], [pytest.approx(NAN, nan_ok=True)] * 2, [1.0, 1.0],
    ]  # fmt: skip


def test_a_step_takes_the_reliability_of_the_trust_and_weights_of_the_rewards() -> None:
    rewards, other, rho = drawn(2, 6), drawn(2, 6, seed=1), torch.tensor([0.25, 0.81]).double()
    settings = BPGOConfig(trust="reliability", zeta=0.0)
    by_name, weights = {"judged": rewards, "exact": other}, {"judged": 2.0, "exact": 0.5}
    found = step_advantages(
        by_name, {}, weights, settings, trusts={"exact": "none"}, reliability={"judged": rho}
    ).posterior  # fmt: skip
    expected = 2 * torch.tensor([[0.5], [0.9]]) * group_relative(rewards) + 0.5 * group_relative(other)
    assert found is not None
    torch.testing.assert_close(found.mean, expected)
    torch.testing.assert_close(found.variance, 4 * (1 - rho))


def test_the_loss_and_its_gradient_equal_an_independent_computation() -> None:
    """Written with exp, and the gradient as (sigmoid(z) - p) dz."""
    beta, scale, gain, p = 3.0, 1.5, drawn(5, 2), torch.tensor([1.0, 0.8, 0.5, NAN, 0.6]).double()
    leaf = gain.clone().requires_grad_()
    found = dpo_loss(leaf, p, beta, scale)
    found.value.backward()
    value, gradient = 0.0, torch.zeros(5, 2, dtype=torch.float64)
    for row, (label, (winner, loser)) in enumerate(zip(p.tolist(), gain.tolist(), strict=True)):
        if math.isnan(label):
            continue
        s = 1 / (1 + math.exp(-beta / 2 * (winner - loser)))
        value -= scale / 5 * (label * math.log(s) + (1 - label) * math.log(1 - s))
        slope = scale / 5 * (s - label) * beta / 2
        gradient[row] = torch.tensor([slope, -slope], dtype=torch.float64)
    assert found.value.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-15)
    assert found.metrics["preference/pairs"].item() == pytest.approx(scale * 4 / 5)


def test_hard_labels_are_plain_dpo_and_equal_policies_give_log_2() -> None:
    gain, hard = drawn(7, 2), torch.ones(7, dtype=torch.float64)
    plain = -torch.nn.functional.logsigmoid(50.0 * (gain[:, 0] - gain[:, 1])).mean()
    torch.testing.assert_close(dpo_loss(gain, hard, 100.0).value, plain)
    for dtype in (torch.float32, torch.float64):
        nothing = torch.zeros(8, 2, dtype=dtype)
        for p in (1.0, 0.75):
            assert dpo_loss(nothing, torch.full((8,), p, dtype=dtype), 100.0).value == torch.tensor(2.0).to(dtype).log()


def test_the_loss_is_smallest_where_the_policys_preference_is_the_label() -> None:
    for p in (0.55, 0.9):
        z = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64)
        leaf = torch.stack([z, torch.zeros_like(z)])[None].requires_grad_()
        dpo_loss(leaf, torch.tensor([p], dtype=torch.float64), 2.0).value.backward()
        assert leaf.grad is not None
        assert leaf.grad.abs().max() < 1e-12


def test_noise_alone_makes_no_pairs() -> None:
    found = Posterior(torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert found.best_against_worst(2).probability.isnan().all()


def test_kto_equals_values_computed_by_hand() -> None:
    # beta 2: z = gain - divergence = .5, -1, 3; the utility of an undesirable sample is sigmoid(-z)
    gain, divergence = torch.tensor([1.0, -0.5, 3.0]), torch.tensor([0.5, 0.5, 0.0])
    found = kto_loss(gain, divergence, torch.tensor([0.2, -4.0, 0.0]), torch.tensor([1.3, 0.7, 0.7]), beta=2.0)
    utilities = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1.0))]
    assert float(found.value) == pytest.approx((1.3 * (1 - utilities[0]) + 0.7 * (1 - utilities[1])) / 3)
    assert float(found.metrics["preference/utility"]) == pytest.approx((sum(utilities) + 0.5) / 3)
    assert float(found.metrics["preference/desirable"]) == pytest.approx(1 / 3)


def test_the_gradient_of_kto_equals_finite_differences_with_a_fixed_reference_point() -> None:
    gain, divergence, advantage, trust = drawn(5), drawn(5, seed=1).abs(), drawn(5, seed=2), drawn(5, seed=3).abs()
    gain.requires_grad_()
    divergence.requires_grad_()
    value = kto_loss(gain, divergence, advantage, trust, 3.0).value
    found = torch.autograd.grad(value, [gain, divergence], allow_unused=True)
    assert found[1] is None
    assert found[0] is not None
    for i in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[i] = 1e-6
        ends = [
            kto_loss(gain.detach() + way * step, divergence.detach(), advantage, trust, 3.0).value for way in (1, -1)
        ]
        assert float(found[0][i]) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, rel=1e-6)
        assert float(found[0][i]) * float(advantage[i]) < 0, "a desirable sample gains, an undesirable one loses"
