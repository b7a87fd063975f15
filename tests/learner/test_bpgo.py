"""BPGO trust and transformation: values by hand, reduction to GRPO, invariances, and errors that name the reward."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.config.learner import AdvantageConfig, BPGOConfig, LossConfig
from bpgo_video.learner.advantages import NORMALISERS, best_and_worst, group_relative
from bpgo_video.learner.agreement import correlation, frame_agreement, group_icc
from bpgo_video.learner.bpgo import step_advantages
from bpgo_video.learner.equations import (
    TRANSFORMS,
    contrastive_reward_transformation,
    released_transformation,
    released_trust,
    reliability_adaptive_scaling,
)
from bpgo_video.learner.losses import PolicyShift, bpgo_loss
from bpgo_video.learner.metrics import rank_inversion, trust_by_kind, trust_histogram
from bpgo_video.learner.trust import agreement_trust
from bpgo_video.types import PriorAnchor

REWARDS = torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64)  # mean 3, variance (4 + 1 + 0 + 9)/3 = 14/3
PRIOR = torch.tensor([2.0], dtype=torch.float64)
OFF = BPGOConfig(alpha=0.0, zeta=0.0)


def anchor(mean, scale=1.0):
    mean = torch.as_tensor(mean)
    return PriorAnchor(mean, torch.ones_like(mean), torch.full(mean.shape, 8), scale, "test")


def one_reward(rewards, prior, settings, scale=1.0, clip=math.inf, **advantage):
    anchors = {"clip": anchor(prior, scale)}
    return step_advantages({"clip": rewards}, anchors, {"clip": 1.0}, settings, AdvantageConfig(**advantage), clip)


def random_rewards(seed, prompts=4, group=6):
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts, group, generator=rng, dtype=torch.float64)
    return rewards, torch.randn(prompts, generator=rng, dtype=torch.float64), rng


def test_trust_equals_values_computed_by_hand():
    # 2 sigmoid(x) - 1 = tanh(x/2). Standardised: mean u = (3 - 2)/2 = .5, k u = 1; verbatim: mean R - prior = 1
    assert reliability_adaptive_scaling(REWARDS, PRIOR, 2.0, 0.5, 2.0).item() == pytest.approx(1.2310585786300049)
    assert reliability_adaptive_scaling(REWARDS, PRIOR, 2.0, 0.5, 1.0).item() == pytest.approx(1.1224593312018546)
    assert reliability_adaptive_scaling(REWARDS, PRIOR, None, 0.3, 1.0).item() == pytest.approx(
        1 + 0.3 * math.tanh(0.5)
    )


def test_trust_stays_within_its_range_and_is_one_at_the_prior():
    rewards = torch.tensor([[-1e6, -1e6], [2.0, 4.0], [1e6, 1e6]])
    trust = reliability_adaptive_scaling(rewards, torch.full((3,), 3.0), 1.0, 0.5, 1.0)
    assert trust.tolist() == [0.5, 1.0, 1.5]


def test_standardised_transformation_equals_values_computed_by_hand():
    # u = (R - 2)/2 = -.5, 0, .5, 2; (u + 1{u > 0}) exp(u)
    expected = [-0.5 * math.exp(-0.5), 0.0, 1.5 * math.exp(0.5), 3 * math.exp(2)]
    assert contrastive_reward_transformation(REWARDS, PRIOR, 2.0, 1.0)[0].tolist() == pytest.approx(expected)
    # the exponent is clamped to [-1, 3]: u = -4 and 5 give (.7 * -4) exp(-1) and (.7 * 5 + 1) exp(3)
    far = torch.tensor([[-6.0, 12.0]], dtype=torch.float64)
    expected = [-2.8 * math.exp(-1), 4.5 * math.exp(3)]
    assert contrastive_reward_transformation(far, PRIOR, 2.0, 0.7)[0].tolist() == pytest.approx(expected)


def test_verbatim_transformation_equals_values_computed_by_hand():
    # R - 2 = -1, 0, 1, 4; (2 (R - 2) + 1{R > 2}) exp(R) = -2 e, 0, 3 e^3, 9 e^6
    expected = [-2 * math.e, 0.0, 3 * math.exp(3), 9 * math.exp(6)]
    assert contrastive_reward_transformation(REWARDS, PRIOR, None, 2.0)[0].tolist() == pytest.approx(expected)


def test_released_form_equals_values_computed_by_hand():
    # v = 1/(4/(14/3) + 1/1) = 7/13, m = v (4 * 3/(14/3) + 2) = (7/13)(18/7 + 2) = 32/13, z = (6/13)/sqrt(7/13) = .62897
    z = (6 / 13) / math.sqrt(7 / 13)
    trust = 0.5 + 0.5 * (1 + math.erf(z / math.sqrt(2)))
    assert released_trust(REWARDS, PRIOR, None, 1.0, 1.0).item() == pytest.approx(trust, abs=1e-8)
    assert released_trust(REWARDS, PRIOR, None, 0.4, 1.0).item() == pytest.approx(1 + 0.4 * (trust - 1), abs=1e-8)
    # standardised with s_ref = 2: deviations halve, so do z's numerator and, under the root, the variance quarters:
    # s2 = 14/12, v = 1/(48/14 + 1) = 7/31, m = v * (48/14) * .5 = 12/31
    z = (12 / 31) / math.sqrt(7 / 31)
    trust = 0.5 + 0.5 * (1 + math.erf(z / math.sqrt(2)))
    assert released_trust(REWARDS, PRIOR, 2.0, 1.0, 1.0).item() == pytest.approx(trust, abs=1e-8)
    # (50 (R - 2) + 1{R > 2}) R sigmoid(R/5)
    expected = [-50 / (1 + math.exp(-0.2)), 0.0, 51 * 3 / (1 + math.exp(-0.6)), 201 * 6 / (1 + math.exp(-1.2))]
    assert released_transformation(REWARDS, PRIOR, None, 50.0)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("contrast", [0.05, 1.0, 50.0])
def test_standardised_transformation_is_strictly_increasing(contrast):
    u = torch.linspace(-6, 8, 140_001, dtype=torch.float64)[None]
    transformed = contrastive_reward_transformation(u, torch.zeros(1), 1.0, contrast)
    assert (transformed.diff() > 0).all()


@settings(deadline=None)  # the first call into torch may be slow
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=8), st.sampled_from([1e-3, 1.0, 1e3]))
def test_standardised_transformation_never_reverses_the_order_of_rewards(values, scale):
    rewards = torch.tensor([[*values, -scale, -scale * (1 - 1e-7), -scale * (1 + 1e-7)]])
    transformed = contrastive_reward_transformation(rewards, torch.zeros(1), scale, 1.0)
    assert transformed.isfinite().all()
    assert rank_inversion(rewards, transformed) == 0


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 0.02, 1e6]), st.floats(-10, 10))
def test_standardised_forms_do_not_depend_on_the_units_of_the_reward(seed, unit, shift):
    rewards, prior, _ = random_rewards(seed)
    moved, moved_prior, scale = (rewards + shift) * unit, (prior + shift) * unit, 0.7 * unit
    for one, other in [
        (f(rewards, prior, 0.7, *rest), f(moved, moved_prior, scale, *rest))
        for f, rest in [
            (reliability_adaptive_scaling, (0.5, 1.0)),
            (contrastive_reward_transformation, (1.0,)),
            (released_trust, (1.0, 1.0)),
        ]
    ]:
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


def test_alpha_and_zeta_zero_are_grpo_bit_for_bit_without_anchors():
    rewards = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    result = step_advantages({"clip": rewards}, {}, {"clip": 1.0}, OFF)
    assert torch.equal(result.advantage, group_relative(rewards))
    assert torch.equal(result.trust, torch.ones(5))
    assert result.contrastive is None
    assert result.metrics["rms_ratio"] == 1
    clipped = result.clipped(1.0)
    assert torch.equal(clipped.advantage, group_relative(rewards).clamp(-1, 1))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_combined_advantages_equal_values_computed_by_hand(form):
    settings = BPGOConfig(form=form, alpha=0.5, contrast=2.0, zeta=0.5)
    result = one_reward(REWARDS, [2.0], settings, scale=2.0)
    if form == "paper":
        trust = 1 + 0.5 * math.tanh(0.25)
        transformed = [-math.exp(-0.5), 0.0, 2 * math.exp(0.5), 5 * math.exp(2)]  # (2 u + 1{u > 0}) exp(u)
    else:
        trust = released_trust(REWARDS, PRIOR, 2.0, 0.5, 1.0).item()
        transformed = released_transformation(REWARDS, PRIOR, 2.0, 2.0)[0].tolist()  # of raw rewards, for any scale
    mean, std = statistics.mean(transformed), statistics.stdev(transformed)
    contrastive = torch.tensor([(value - mean) / (std + 1e-6) for value in transformed], dtype=torch.float64)
    torch.testing.assert_close(result.advantage, trust * group_relative(REWARDS))
    torch.testing.assert_close(result.contrastive[0], contrastive, rtol=2e-6, atol=0)  # the noise floor of A
    assert result.trust.item() == pytest.approx(trust)
    total = trust * group_relative(REWARDS)[0] + 0.5 * contrastive
    rms_ratio = total.square().mean().sqrt() / group_relative(REWARDS).square().mean().sqrt()
    assert result.metrics["rms_ratio"].item() == pytest.approx(rms_ratio.item(), rel=1e-6)


def test_each_half_can_be_used_alone():
    rewards, prior, _ = random_rewards(2)
    ras, crt = (one_reward(rewards, prior, BPGOConfig(**off)) for off in ({"zeta": 0.0}, {"alpha": 0.0}))
    both = one_reward(rewards, prior, BPGOConfig())
    assert ras.contrastive is None
    assert "crt/rank_inversion" not in ras.metrics
    assert torch.equal(ras.trust, both.trust)
    assert (ras.trust != 1).all()
    assert torch.equal(crt.trust, torch.ones_like(prior))
    assert torch.equal(crt.contrastive, both.contrastive)


def test_centred_trust_redistributes_between_groups():
    rewards = torch.tensor([[1.0, 3.0], [4.0, 6.0], [6.0, 8.0]], dtype=torch.float64)  # mean u = (2, 5, 7) - 1
    prior = torch.ones(3, dtype=torch.float64)
    centred = reliability_adaptive_scaling(rewards, prior, 1.0, 0.5, 0.3, centre=True)
    x = [0.3 * (mean - 14 / 3) for mean in (2, 5, 7)]
    assert centred.tolist() == pytest.approx([1 + 0.5 * math.tanh(value / 2) for value in x])
    # a shift that all groups share changes nothing: no hidden learning rate
    torch.testing.assert_close(reliability_adaptive_scaling(rewards + 9, prior, 1.0, 0.5, 0.3, centre=True), centred)
    released = released_trust(rewards, prior, 1.0, 1.0, 1.0, centre=True)
    z = [math.sqrt(1 / 2) * mean for mean in (1, 4, 6)]  # s2 = 2, v = 1/(2/2 + 1) = 1/2, m = v * mean u
    phi = [0.5 * (1 + math.erf((value - sum(z) / 3) / math.sqrt(2))) for value in z]
    assert released.tolist() == pytest.approx([0.5 + value for value in phi], abs=1e-7)


@pytest.mark.parametrize("trust", ["sigmoid", "posterior"])
def test_a_single_group_or_equal_groups_have_centred_trust_one(trust):
    rewards, _, _ = random_rewards(6)
    settings = BPGOConfig(trust=trust, ras_center="batch_mean")
    assert one_reward(rewards[:1], [-3.0], settings).trust.tolist() == [1.0]
    same = one_reward(rewards[:1].repeat(3, 1), [-3.0] * 3, settings)
    assert same.trust.tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_each_form_accepts_any_trust_and_has_a_default(form):
    rewards, prior, _ = random_rewards(7)
    found = {t: one_reward(rewards, prior, BPGOConfig(form=form, trust=t)) for t in ("sigmoid", "posterior", "none")}
    torch.testing.assert_close(found["sigmoid"].trust, reliability_adaptive_scaling(rewards, prior, 1.0, 0.5, 1.0))
    torch.testing.assert_close(found["posterior"].trust, released_trust(rewards, prior, 1.0, 0.5, 1.0))
    assert torch.equal(found["none"].trust, torch.ones_like(prior))
    default = one_reward(rewards, prior, BPGOConfig(form=form))
    assert torch.equal(default.trust, found["sigmoid" if form == "paper" else "posterior"].trust)
    assert all(torch.equal(result.contrastive, default.contrastive) for result in found.values())


def test_trust_in_reliability_needs_it_and_no_anchor():
    settings = BPGOConfig(trust="reliability", zeta=0.0)
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 1.0, 2.0, 3.0]])
    rho = {"clip": torch.tensor([1.0, 0.0])}
    result = step_advantages({"clip": rewards}, {}, {"clip": 1.0}, settings, reliability=rho)
    assert result.trust.tolist() == pytest.approx([1.5, 0.5])
    assert torch.equal(result.advantage, torch.tensor([[1.5], [0.5]]) * group_relative(rewards))
    with pytest.raises(ValueError, match=r"'clip': trust 'reliability' compares several scorings"):
        step_advantages({"clip": rewards}, {}, {"clip": 1.0}, settings)
    with pytest.raises(ValueError, match=r"'clip': its reliability is .*nan.*finite"):
        step_advantages({"clip": rewards}, {}, {"clip": 1.0}, settings, reliability={"clip": rho["clip"] / 0})
    rho = torch.tensor([0.9, 0.4, 0.0])
    assert agreement_trust(rho, 0.5).tolist() == pytest.approx([1.4, 0.9, 0.5])
    assert agreement_trust(rho, 0.5, centre=True).tolist() == pytest.approx([1.4667, 0.9667, 0.5667], abs=1e-4)


def test_anchors_are_in_the_metrics():
    rewards = random_rewards(8)[0]
    metrics = one_reward(rewards, [1.0, 2.0, 3.0, 4.0], BPGOConfig(), scale=0.3).metrics
    assert (metrics["prior/mean/clip"].item(), metrics["prior/scale/clip"].item()) == pytest.approx((2.5, 0.3))
    variances = [statistics.variance(group) for group in rewards.tolist()]
    assert metrics["prior/group_std/clip"].item() == pytest.approx(statistics.mean(variances) ** 0.5)


def test_trust_scales_the_second_surrogate_only_with_ras_on_crt():
    rewards, prior, _ = random_rewards(3)
    plain, weighed = (one_reward(rewards, prior, BPGOConfig(ras_on_crt=flag)) for flag in (False, True))
    torch.testing.assert_close(weighed.contrastive, plain.trust[:, None] * plain.contrastive)
    assert torch.equal(weighed.advantage, plain.advantage)


SETTINGS = st.builds(
    BPGOConfig,
    form=st.sampled_from(["paper", "released"]),
    trust=st.sampled_from([None, "sigmoid", "posterior", "frames", "reliability", "none"]),
    standardise=st.booleans(),
    ras_center=st.sampled_from(["none", "batch_mean"]),
    ras_on_crt=st.booleans(),
    match_rms=st.booleans(),
    zeta=st.sampled_from([0.0, 0.5]),
)
ADVANTAGE_SETTINGS = st.builds(
    AdvantageConfig,
    normalise=st.sampled_from(sorted(NORMALISERS)),
    combine=st.sampled_from(["weighted_sum", "gdpo"]),
    drop_zero_std=st.booleans(),
    best_of=st.sampled_from([None, 2]),
)


CLIPS = st.sampled_from([math.inf, 1.0])


def scored_twice(rewards, second, prior, settings, advantage, clip, scale=1.0):
    anchors, weights = {"clip": anchor(prior, scale)}, {"clip": 1.0}
    scorings = torch.stack([rewards, second], dim=2)
    rho = group_icc(scorings).clamp(0, 1)
    return step_advantages(
        {"clip": rewards}, anchors, weights, settings, advantage, clip,
        frames={"clip": scorings}, reliability={"clip": rho},
    )  # fmt: skip


@settings(deadline=None)
@given(st.integers(0, 2**31), SETTINGS, ADVANTAGE_SETTINGS, CLIPS)
def test_permuting_samples_or_prompts_permutes_everything(seed, bpgo, advantage, clip):
    rewards, prior, rng = random_rewards(seed)
    second = rewards + torch.randn(4, 6, generator=rng, dtype=torch.float64)
    rows, columns = torch.randperm(4, generator=rng), torch.randperm(6, generator=rng)
    base = scored_twice(rewards, second, prior, bpgo, advantage, clip)
    moved = scored_twice(rewards[rows][:, columns], second[rows][:, columns], prior[rows], bpgo, advantage, clip)
    torch.testing.assert_close(moved.advantage, base.advantage[rows][:, columns])
    if bpgo.zeta:
        torch.testing.assert_close(moved.contrastive, base.contrastive[rows][:, columns])
    torch.testing.assert_close(moved.trust, base.trust[rows])
    for name, value in base.metrics.items():
        torch.testing.assert_close(moved.metrics[name], value)


@settings(deadline=None)
@given(st.integers(0, 2**31), SETTINGS, ADVANTAGE_SETTINGS, CLIPS, st.sampled_from([1e6, 1e-6]))
def test_standardised_settings_are_finite_on_any_scale(seed, bpgo, advantage, clip, unit):
    rewards, prior, rng = random_rewards(seed)
    second = rewards + torch.randn(4, 6, generator=rng, dtype=torch.float64)
    bpgo = replace(bpgo, form="paper", standardise=True)
    found = scored_twice(
        *((unit * tensor).float() for tensor in (rewards, second, prior)), bpgo, advantage, clip, scale=0.7 * unit
    )
    for tensor in (found.advantage, found.trust, *found.metrics.values(), *([found.contrastive] * bool(bpgo.zeta))):
        assert tensor.isfinite().all()


@settings(deadline=None)
@given(st.floats(-5, 5, width=32), SETTINGS, ADVANTAGE_SETTINGS, CLIPS)
def test_equal_rewards_have_no_gradient_under_any_settings(value, bpgo, advantage, clip):
    rewards = torch.full((3, 6), value)
    found = scored_twice(rewards, rewards, [0.1, 0.2, 0.3], bpgo, advantage, clip)
    log_ratio = torch.zeros(18, requires_grad=True)
    contrastive = None if found.contrastive is None else found.contrastive.flatten()
    bpgo_loss(PolicyShift(log_ratio), found.advantage.flatten(), contrastive, bpgo.zeta, LossConfig()).value.backward()
    assert torch.equal(log_ratio.grad, torch.zeros(18))


@settings(deadline=None)
@given(st.integers(0, 2**31), SETTINGS, ADVANTAGE_SETTINGS, CLIPS)
def test_no_trust_and_no_second_surrogate_is_grpo_bit_for_bit(seed, bpgo, advantage, clip):
    rewards, prior, _ = random_rewards(seed)
    off = replace(bpgo, zeta=0.0, match_rms=False, **({"alpha": 0.0} if bpgo.trust != "none" else {}))
    found = scored_twice(rewards, rewards, prior, off, advantage, clip)
    plain = step_advantages({"clip": rewards}, {}, {"clip": 1.0}, OFF, advantage, clip)
    assert torch.equal(found.advantage, plain.advantage)
    assert torch.equal(found.trust, torch.ones_like(prior))
    assert found.contrastive is None
    assert found.metrics["rms_ratio"] == 1
    matched = scored_twice(rewards, rewards, prior, replace(off, match_rms=True), advantage, clip)
    assert torch.equal(matched.advantage, plain.advantage)


def test_several_rewards_are_anchored_one_by_one():
    first, second = REWARDS, torch.tensor([[0.3, 0.1, 0.2, 0.4]], dtype=torch.float64)
    anchors = {"vq": anchor([2.0], 2.0), "ta": anchor([0.2], 0.1)}
    result = step_advantages({"vq": first, "ta": second}, anchors, {"vq": 3.0, "ta": 1.0}, BPGOConfig())
    # mean u: (3 - 2)/2 = .5 and (.25 - .2)/.1 = .5 + rounding of fp32 anchors
    trust = 1 + 0.5 * math.tanh(0.25)
    torch.testing.assert_close(
        result.advantage, trust * (3 * group_relative(first) + group_relative(second)), rtol=1e-6, atol=1e-6
    )
    assert result.trust.item() == pytest.approx(trust, abs=1e-6)
    transformed = [
        contrastive_reward_transformation(rewards, anchors[name].mean, anchors[name].scale, 1.0)
        for name, rewards in (("vq", first), ("ta", second))
    ]
    expected = 3 * group_relative(transformed[0]) + group_relative(transformed[1])
    torch.testing.assert_close(result.contrastive, expected, rtol=1e-5, atol=1e-5)  # the noise floor of A


@pytest.mark.parametrize("ras_on_crt", [False, True])
def test_each_reward_is_weighted_by_its_own_trust_before_rewards_are_summed(ras_on_crt):
    anchors, other = {"vq": anchor([-1e6]), "ta": anchor([1e6])}, -(REWARDS**2)  # w = 1.5 and .5
    settings = BPGOConfig(zeta=0.7, ras_on_crt=ras_on_crt)
    result = step_advantages({"vq": REWARDS, "ta": other}, anchors, {"vq": 3.0, "ta": 1.0}, settings)
    torch.testing.assert_close(result.advantage, 3 * 1.5 * group_relative(REWARDS) + 0.5 * group_relative(other))
    assert result.trust.item() == pytest.approx((3 * 1.5 + 0.5) / 4), "for logs: the mean by weight"
    assert result.metrics["trust_mean/vq"].item() == pytest.approx(1.5)
    alone = [
        one_reward(rewards, anchors[name].mean, BPGOConfig(alpha=0.0)).contrastive
        for name, rewards in (("vq", REWARDS), ("ta", other))
    ]
    factors = (3 * 1.5, 0.5) if ras_on_crt else (3, 1)
    torch.testing.assert_close(result.contrastive, factors[0] * alone[0] + factors[1] * alone[1])


def test_rewards_may_have_trusts_of_their_own():
    rewards, prior, rng = random_rewards(9)
    frames = rewards[..., None] + torch.randn(4, 6, 5, generator=rng, dtype=torch.float64)
    settings, trusts = BPGOConfig(trust="frames", zeta=0.0), {"b": "none", "c": "sigmoid"}
    found = step_advantages(
        dict.fromkeys("abc", rewards), {"c": anchor(prior)}, dict.fromkeys("abc", 1.0), settings,
        trusts=trusts, frames={"a": frames},
    )  # fmt: skip
    by_frames = 0.5 + frame_agreement(frames)
    expected = by_frames + 1 + reliability_adaptive_scaling(rewards, prior, 1.0, 0.5, 1.0)
    torch.testing.assert_close(found.advantage, expected[:, None] * group_relative(rewards))
    with pytest.raises(ValueError, match=r"reward 'b': trust 'frames' compares.*'reliability'"):
        step_advantages({"b": rewards}, {}, {"b": 1.0}, settings, frames={"a": frames})


def test_trust_in_the_uncertainty_that_a_reward_states_compares_it_with_the_spread_of_the_scores():
    settings = BPGOConfig(trust="uncertainty", zeta=0.0)
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    std = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.1, 0.1, 0.1, 0.1]])
    found = step_advantages({"clip": rewards}, {}, {"clip": 1.0}, settings, stds={"clip": std})
    rho = [1 - 0.625 / (5 / 3), 1.0, 0.0, 0.0]  # var_j R of 1, 2, 3, 4 is 5/3
    assert found.trust.tolist() == pytest.approx([0.5 + value for value in rho])
    torch.testing.assert_close(found.advantage, found.trust[:, None] * group_relative(rewards))
    for stds in ({}, {"other": std}):
        with pytest.raises(ValueError, match=r"'clip': trust 'uncertainty'.*states none.*'reliability'"):
            step_advantages({"clip": rewards}, {}, {"clip": 1.0}, settings, stds=stds)


def test_equal_reliability_is_grpo_but_for_rounding_once_the_step_size_is_matched():
    rewards, _, _ = random_rewards(11)
    settings = BPGOConfig(trust="reliability", zeta=0.0, match_rms=True)
    rho = {"clip": torch.full((4,), 0.3, dtype=torch.float64)}
    found = step_advantages({"clip": rewards}, {}, {"clip": 1.0}, settings, reliability=rho)
    torch.testing.assert_close(found.advantage, group_relative(rewards), rtol=1e-14, atol=1e-14)


def test_agreement_of_rewards_is_their_mean_correlation_within_groups():
    one = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    other = torch.tensor([[0.0, 5.0, 10.0], [1.0, 2.0, 0.0], [1.0, 2.0, 3.0]])  # correlations 1, -.5, none
    assert correlation(one, other).tolist() == pytest.approx([1, -0.5, 0])
    metrics = step_advantages({"a": one, "b": other}, {}, {"a": 1.0, "b": 1.0}, OFF).metrics
    assert metrics["agreement/a+b"].item() == pytest.approx(1 / 6)


def test_a_watched_reward_is_compared_with_the_others_and_changes_nothing():
    one = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    truth = torch.tensor([[0.0, 5.0, 10.0], [1.0, 2.0, 0.0], [1.0, 2.0, 3.0]])  # correlations 1, -.5, -.5
    rho = {"clip": torch.tensor([0.9, 0.2, 0.4], dtype=torch.float64)}
    settings = BPGOConfig(trust="reliability", zeta=0.5, match_rms=True)
    anchors, weights = {"clip": anchor(torch.zeros(3))}, {"clip": 2.0}
    alone = step_advantages({"clip": one}, anchors, weights, settings, reliability=rho)
    watched = step_advantages({"clip": one, "o": truth}, anchors, {**weights, "o": 0.0}, settings, reliability=rho)
    for name in ("advantage", "contrastive", "trust"):
        assert torch.equal(getattr(watched, name), getattr(alone, name))
    new = {name: value.item() for name, value in watched.metrics.items() if name not in alone.metrics}
    # ranks of the trust: 3, 1, 2; of the validity: 3, 1.5, 1.5
    assert new == pytest.approx({"validity/clip+o": 0.0, "trust_validity/clip+o": 3**0.5 / 2}, abs=1e-6)
    equal = step_advantages({"clip": one, "o": truth}, {}, {**weights, "o": 0.0}, OFF)
    assert "trust_validity/clip+o" not in equal.metrics, "a trust that is the same everywhere has no rank correlation"


@pytest.mark.parametrize("group", [6, 8, 12, 24])
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("standardise", [True, False])
def test_equal_rewards_give_exactly_zero_advantages(group, form, standardise):
    rewards = torch.tensor([0.1, 0.27, 1 / 3, 7.3])[:, None].repeat(1, group)
    result = one_reward(rewards, [0.2, 0.2, 0.2, 0.2], BPGOConfig(form=form, standardise=standardise), scale=0.05)
    assert torch.equal(result.advantage, torch.zeros_like(rewards))
    assert torch.equal(result.contrastive, torch.zeros_like(rewards))
    assert result.metrics["zero_std_share"] == 1
    assert result.metrics["rms_ratio"] == 1


def test_equal_rewards_stay_equal_despite_rounding_in_the_transformation(monkeypatch):
    def rounds_by_position(rewards, prior, scale, contrast):
        return rewards + 1e-7 * torch.arange(rewards.shape[1])

    monkeypatch.setitem(TRANSFORMS, "paper", rounds_by_position)
    result = one_reward(torch.full((1, 8), 0.3), [0.2], BPGOConfig())
    assert torch.equal(result.contrastive, torch.zeros(1, 8))


def test_the_advantage_clip_acts_after_the_trust():
    settings = BPGOConfig(zeta=0.5)
    result = one_reward(torch.tensor([[0.0, 1.0, 2.0, 30.0]]), [-1e6], settings)  # w = 1.5
    limit = result.advantage.max().item() - 0.3
    clipped = result.clipped(limit)
    assert clipped.advantage.max().item() == pytest.approx(limit)
    assert torch.equal(clipped.advantage[0, :3], result.advantage[0, :3])
    assert clipped.contrastive.abs().max() <= limit


def rms(tensor):
    return tensor.square().mean().sqrt().item()


def test_step_size_is_measured_after_the_clip():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 30.0]], dtype=torch.float64)
    clipped = one_reward(rewards, [-1e6], BPGOConfig(zeta=0.0), clip=1.2)  # w = 1.5, A = about (-.6, -.5, -.4, 1.5)
    plain = group_relative(rewards).clamp(-1.2, 1.2)
    expected = rms((1.5 * group_relative(rewards)).clamp(-1.2, 1.2)) / rms(plain)
    assert clipped.metrics["rms_ratio"].item() == pytest.approx(expected)
    assert expected < 1.4, "without the clip it is 1.5"


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["paper", "released"]), st.booleans())
def test_matching_the_rms_takes_one_factor_on_both_advantages(seed, form, ras_on_crt):
    rewards, prior, _ = random_rewards(seed)
    settings = BPGOConfig(form=form, ras_on_crt=ras_on_crt, zeta=0.8)
    free = one_reward(rewards, prior, settings)
    matched = one_reward(rewards, prior, replace(settings, match_rms=True))
    total = matched.advantage + 0.8 * matched.contrastive
    assert rms(total) == pytest.approx(rms(group_relative(rewards)))
    assert matched.metrics["rms_ratio"].item() == pytest.approx(1)
    assert torch.equal(matched.trust, free.trust)
    factor = 1 / free.metrics["rms_ratio"]
    torch.testing.assert_close(matched.advantage, factor * free.advantage)
    torch.testing.assert_close(matched.contrastive, factor * free.contrastive)


def test_matching_a_batch_without_signal_changes_nothing():
    result = one_reward(torch.full((2, 4), 0.3), [0.2, 0.2], BPGOConfig(match_rms=True))
    assert torch.equal(result.advantage, torch.zeros(2, 4))
    assert result.metrics["rms_ratio"] == 1


@pytest.mark.parametrize("normalise", sorted(NORMALISERS))
def test_both_surrogates_use_the_same_norm(normalise):
    rewards, prior, _ = random_rewards(4)
    result = one_reward(rewards, prior, BPGOConfig(), normalise=normalise)
    transformed = contrastive_reward_transformation(rewards, prior, 1.0, 1.0)
    torch.testing.assert_close(result.advantage, result.trust[:, None] * NORMALISERS[normalise](rewards))
    torch.testing.assert_close(result.contrastive, NORMALISERS[normalise](transformed), rtol=1e-5, atol=1e-5)


def test_excluded_samples_are_zero_and_the_others_are_rescaled():
    rewards, prior, _ = random_rewards(5)  # groups of 6
    whole = one_reward(rewards, prior, BPGOConfig())
    best = one_reward(rewards, prior, BPGOConfig(), best_of=1)
    kept = best_and_worst(whole.advantage, 1).double()
    torch.testing.assert_close(best.advantage, 3 * kept * whole.advantage)
    torch.testing.assert_close(best.contrastive, 3 * kept * whole.contrastive)
    per_sample = whole.advantage[kept.bool()]
    assert best.advantage.square().mean() == pytest.approx(3 * per_sample.square().mean())


def test_the_clip_bounds_advantages_before_they_are_rescaled():
    result = one_reward(torch.tensor([[0.0, 1.0, 2.0, 30.0]]), [0.0], OFF, best_of=1, clip=0.7)
    assert result.advantage[0, 3].item() == pytest.approx(2 * 0.7)


def test_dropping_flat_groups_rescales_the_others():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    result = one_reward(rewards, [0.0, 0.0, 0.0], OFF, drop_zero_std=True)
    torch.testing.assert_close(result.advantage, 3 * group_relative(rewards))
    both = {"flat": torch.ones(3, 3), "clip": rewards}
    settings = AdvantageConfig(drop_zero_std=True)
    result = step_advantages(both, {}, {"flat": 1.0, "clip": 1.0}, OFF, settings)
    torch.testing.assert_close(result.advantage, 3 * group_relative(rewards))  # a group counts if any reward differs


def test_the_histogram_of_trust_covers_its_range():
    rewards = torch.tensor([[0.0, 2.0], [1.0, 1.0], [-1e6, -1e6 + 1], [2.0, 4.0]])
    metrics = one_reward(rewards, [1.0, -1e6, 1e6, 3.0], BPGOConfig()).metrics  # w = 1, 1.5, .5, 1
    shares = [metrics[f"trust/hist/{place:02d}"].item() for place in range(10)]
    assert shares == [0.25, 0, 0, 0, 0, 0.5, 0, 0, 0, 0.25]
    assert not any("hist" in name for name in one_reward(rewards, [0.0] * 4, OFF).metrics)
    exact = trust_histogram(torch.tensor([0.76, 0.83, 0.97, 1.07, 1.24]), 0.25)  # edges .75, .8, ..., 1.25
    assert exact.tolist() == pytest.approx([0.2, 0.2, 0, 0, 0.2, 0, 0.2, 0, 0, 0.2])


def test_the_trust_of_a_kind_of_prompts_is_the_mean_over_those_with_its_tag():
    trust, tags = torch.tensor([0.5, 1.5, 1.0]), (("clear",), ("open", "clear"), ())
    found = trust_by_kind(trust, tags, ["clear", "open", "absent"])
    assert {name: value.item() for name, value in found.items()} == {"trust_kind/clear": 1.0, "trust_kind/open": 1.5}
    assert trust_by_kind(trust, (), ["clear"]) == {}


def test_rank_inversion_equals_values_computed_by_hand():
    # pairs of (1, 2, 3, 3): 12 13 13 23 23 ordered, 33 tied. Transformed (5, 4, 6, 2): 12 turns, 1-2 turns, 2-2 turns
    share = rank_inversion(torch.tensor([[1.0, 2.0, 3.0, 3.0]]), torch.tensor([[5.0, 4.0, 6.0, 2.0]]))
    assert share.item() == pytest.approx(3 / 5)


def test_the_verbatim_form_reverses_ranks_far_below_the_prior_and_reports_this():
    rewards = torch.tensor([[-4.0, -3.0, -2.0, 0.5]])
    verbatim = one_reward(rewards, [0.0], BPGOConfig(standardise=False))
    assert verbatim.metrics["crt/rank_inversion/clip"].item() == pytest.approx(3 / 6)  # u exp(u) falls below -1
    assert one_reward(rewards, [0.0], BPGOConfig()).metrics["crt/rank_inversion"] == 0


def test_metrics_of_trust_equal_values_computed_by_hand():
    rewards = torch.tensor([[0.0, 2.0], [1.0, 1.0], [-1e6, -1e6 + 1]])
    metrics = one_reward(rewards, [1.0, -1e6, 1e6], BPGOConfig()).metrics  # w = 1, 1.5, .5
    values = [metrics[f"trust_{name}"].item() for name in ("mean", "min", "max", "std")]
    assert values == pytest.approx([1.0, 0.5, 1.5, math.sqrt(0.5 / 3)])
    assert metrics["zero_std_share"].item() == pytest.approx(1 / 3)
    ras = one_reward(rewards[:1], [-1e6], BPGOConfig(zeta=0.0)).metrics
    assert ras["rms_ratio"].item() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("settings", "value"), [(BPGOConfig(standardise=False), 800.0), (BPGOConfig(form="released"), 1e160)]
)
def test_overflow_names_reward_and_value(settings, value):
    rewards = torch.tensor([[1.0, 2.0], [value, 3.0]], dtype=torch.float64)
    with pytest.raises(OverflowError, match=rf"'clip'.*{value:g}.*standardise".replace("+", r"\+")):
        one_reward(rewards, [0.0, 0.0], settings)


@pytest.mark.parametrize("value", [1e6, -1e6, 1e-6])
def test_the_standardised_form_is_finite_on_any_scale(value):
    result = one_reward(torch.tensor([[value, 2 * value, -value, 0.0]]), [0.0], BPGOConfig())
    for tensor in (result.advantage, result.contrastive, result.trust, *result.metrics.values()):
        assert tensor.isfinite().all()


def test_errors_name_the_reward():
    rewards, weights = {"clip": torch.tensor([[0.0, 1.0]])}, {"clip": 1.0}
    with pytest.raises(ValueError, match=r"'clip' has no prior anchor.*bpgo-video priors"):
        step_advantages(rewards, {}, weights, BPGOConfig())
    with pytest.raises(ValueError, match=r"'clip'.*scale=0"):
        step_advantages(rewards, {"clip": anchor([0.0], 0.0)}, weights, BPGOConfig())
    with pytest.raises(ValueError, match=r"'clip'.*not finite"):
        step_advantages(rewards, {"clip": anchor([math.nan])}, weights, BPGOConfig())
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"'clip' is {bad} at prompt row 0, sample 1"):
            step_advantages({"clip": torch.tensor([[0.0, bad]])}, {}, weights, OFF)


def test_plain_functions_refuse_a_scale_of_zero_and_a_negative_contrast():
    with pytest.raises(ValueError, match="scale=0"):
        reliability_adaptive_scaling(REWARDS, PRIOR, 0.0, 0.5, 1.0)
    with pytest.raises(ValueError, match="contrast=-1"):
        contrastive_reward_transformation(REWARDS, PRIOR, 1.0, -1.0)


def test_frame_credit_is_scaled_with_the_advantage_and_never_clipped() -> None:
    rewards = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    by_frame = torch.tensor([3.0, -1.0, -2.0]).expand(2, 6, 3)
    found = step_advantages(
        {"a": rewards}, {}, {"a": 1.0}, OFF, AdvantageConfig(best_of=2), clip=0.5, credit={"a": by_frame}
    )
    kept = found.advantage != 0
    assert kept.sum(dim=1).tolist() == [4, 4]
    torch.testing.assert_close(found.by_frame, 1.5 * by_frame * kept[..., None])  # 6 / (2 x 2) of the loss's mean
    rows, samples = torch.tensor([1, 0]), torch.tensor([0, 5])
    rows_of_loss = found.of(rows, samples)
    video = found.advantage[rows, samples]
    torch.testing.assert_close(rows_of_loss.advantage.view(2, 3).mean(dim=1), video)
    torch.testing.assert_close(rows_of_loss.advantage.view(2, 3), video[:, None] + found.by_frame[rows, samples])


def test_the_step_size_is_matched_with_frame_credit_and_after_the_clip():
    """Exact where a clip acts on some advantages, and where latent frames have advantages of their own."""
    rewards, prior, rng = random_rewards(12)
    credit = torch.randn(4, 6, 3, generator=rng, dtype=torch.float64)
    credit = {"clip": credit - credit.mean(dim=2, keepdim=True)}
    settings, anchors = BPGOConfig(zeta=0.8, match_rms=True), {"clip": anchor(prior)}
    for clip, by_frame in ((math.inf, credit), (0.3, None), (0.3, credit)):
        matched, grpo = (
            step_advantages({"clip": rewards}, anchors, {"clip": 1.0}, of, clip=clip, credit=by_frame)
            for of in (settings, OFF)
        )
        assert rms(matched.total(0.8)) == pytest.approx(rms(grpo.total(0)), rel=1e-12)
        if clip < math.inf:
            assert matched.contrastive.abs().max() == clip, "the clip acts"


def test_rewards_that_differ_in_their_last_bit_have_no_advantage():
    """A divides by std + 1e-6; A~ has the same floor, though its rewards are transformed to differ by about 1."""
    equal = torch.full((1, 8), 0.3)
    equal[0, 7] = torch.nextafter(equal[0, 0], torch.tensor(1.0))
    for prior in (0.3, 0.0):  # the step of CRT, and its slope
        found = one_reward(equal, [prior], BPGOConfig(), scale=1e-7)
        assert 0 < found.advantage.max() < 0.1
        assert 0 < found.contrastive.max() < 0.1


def test_the_second_surrogate_restores_what_trust_takes_from_groups_below_their_anchor():
    """Far below the anchor CRT is linear: A~ = A, and RMS(w A + zeta A~)/RMS(A) = w + zeta (arXiv 2511.18919)."""
    rewards, _, _ = random_rewards(13)
    far = one_reward(rewards, rewards.mean(dim=1) + 30, BPGOConfig())
    torch.testing.assert_close(far.contrastive, group_relative(rewards), rtol=1e-4, atol=1e-4)
    assert far.metrics["crt/distrusted_rms"].item() == pytest.approx(0.5 + 0.5, abs=1e-4)
    weighed = one_reward(rewards, rewards.mean(dim=1) + 30, BPGOConfig(ras_on_crt=True))
    torch.testing.assert_close(weighed.total(0.5)[..., 0], 0.5 * 1.5 * group_relative(rewards), rtol=1e-4, atol=1e-4)
    assert "crt/distrusted_rms" not in weighed.metrics
    assert "crt/distrusted_rms" not in one_reward(rewards, [-9.0] * 4, BPGOConfig()).metrics, "all groups are trusted"


def test_released_exact_is_the_authors_step():
    """An independent reading of the authors' code: rewards are overwritten, and trust and advantage see R~."""
    rewards, prior, _ = random_rewards(14)
    settings = BPGOConfig(form="released_exact", alpha=1.0, contrast=50.0, zeta=0.0, standardise=False)
    found = one_reward(rewards, prior, settings, scale=0.3)
    for row, anchor_of_row, advantage, trust in zip(rewards, prior, found.advantage, found.trust, strict=True):
        p = float(anchor_of_row)
        new = [(50 * (r - p) + (1 if r > p else 0)) * r / (1 + math.exp(-r / 5)) for r in row.tolist()]
        mean, s2 = statistics.mean(new), statistics.variance(new) + 1e-8
        v = 1 / (6 / s2 + 1 / 1.0)
        m = v * (6 * mean / s2 + p / 1.0)
        w = 0.5 + (1.5 - 0.5) * 0.5 * (1 + math.erf((m - p) / math.sqrt(v) / math.sqrt(2)))
        scale = min(max(1 + 1.0 * (w - 1), 0.01), 10)
        assert float(trust) == pytest.approx(scale)
        expected = [scale * (r - mean) / (statistics.stdev(new) + 1e-6) for r in new]
        assert advantage.tolist() == pytest.approx(expected)
    assert found.contrastive is None
    with pytest.raises(ValueError, match=r"released_exact.*zeta = 0.5.*set zeta to 0"):
        BPGOConfig(form="released_exact", standardise=False)


@pytest.mark.parametrize(("level", "expected"), [(-3, 1.05), (-1, 1.24), (0, 1.46), (2, 1.86)])
def test_the_step_of_both_surrogates_against_grpos(level, expected):
    """RMS(w A + zeta A~)/RMS(A) of groups of 8 at a distance u from their anchor: the numbers of docs/bpgo.md."""
    rewards = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + level
    found = one_reward(rewards, torch.zeros(20_000, dtype=torch.float64), BPGOConfig())
    assert found.metrics["rms_ratio"].item() == pytest.approx(expected, abs=0.01)
