"""Advantages: values computed by hand, exact zeros for equal rewards, and invariance to the order of samples."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.config.learner import AdvantageConfig
from bpgo_video.learner.advantages import (
    NORMALISERS,
    averaged_below,
    batch_relative,
    batch_standardised_sum,
    best_and_worst,
    clip_advantages,
    equal_groups,
    group_relative,
    loss_scale,
    max_std_relative,
    mean_subtracted,
    weighted_sum,
    win_rate_relative,
    win_rates,
)

TWO_GROUPS = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
DEVIATIONS = [[-2.0, -1.0, 0.0, 3.0], [-0.5, 0.5, -0.5, 0.5]]  # from the means 3 and .5


def test_group_relative_advantages_equal_values_computed_by_hand():
    # {1, 2, 3, 6}: mean 3, deviations -2 -1 0 3, squares 4 1 0 9 = 14, std (ddof 1) sqrt(14/3) = 2.1602469
    std = math.sqrt(14 / 3) + 1e-6
    expected = torch.tensor([[-2 / std, -1 / std, 0.0, 3 / std]], dtype=torch.float64)
    torch.testing.assert_close(
        group_relative(torch.tensor([[1.0, 2.0, 3.0, 6.0]]).double()), expected, rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("group", [2, 6, 8, 12, 24])
@pytest.mark.parametrize("value", [0.1, 0.27, 1 / 3, 21.7, 1e6, -1e-6])
def test_a_flat_group_gives_exactly_zero(group, value):
    rewards = torch.cat([torch.full((1, group), value), torch.randn(1, group)])
    advantage = group_relative(rewards)
    assert torch.equal(advantage[0], torch.zeros(group))
    assert (advantage[1] != 0).any()


@pytest.mark.parametrize("normalise", NORMALISERS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6])
def test_flat_groups_are_exactly_zero_by_every_norm(normalise, value):
    rewards = torch.cat([torch.full((2, 6), value), torch.randn(1, 6)])
    assert torch.equal(NORMALISERS[normalise](rewards)[:2], torch.zeros(2, 6))
    assert torch.equal(NORMALISERS[normalise](rewards[:2]), torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("norm", "spread"),
    [
        (batch_relative, statistics.stdev([1, 2, 3, 6, 0, 1, 0, 1]) + 1e-6),
        (max_std_relative, math.sqrt(14 / 3) + 1e-6),  # the first group's
        (mean_subtracted, 1.0),
    ],
)
def test_a_common_std_for_all_groups_equals_values_computed_by_hand(norm, spread):
    expected = torch.tensor(DEVIATIONS, dtype=torch.float64) / spread
    torch.testing.assert_close(norm(TWO_GROUPS), expected, rtol=0, atol=1e-15)


def test_win_rates_depend_only_on_the_order():
    rewards = torch.tensor([[1.0, 5.0, 5.0, 900.0], [0.3, 0.2, 0.1, 0.0]])
    expected = torch.tensor([[0, 1.5 / 3, 1.5 / 3, 1], [1, 2 / 3, 1 / 3, 0]])
    torch.testing.assert_close(win_rates(rewards), expected)
    torch.testing.assert_close(win_rate_relative(rewards), win_rate_relative(rewards**3))
    torch.testing.assert_close(win_rate_relative(rewards), group_relative(win_rates(rewards)))


@settings(deadline=None)  # the first call into torch may be slow
@given(st.integers(0, 2**31), st.sampled_from([1.0, 1e6]), st.floats(-10, 10), st.sampled_from(sorted(NORMALISERS)))
def test_all_norms_except_none_are_invariant_to_scale_and_offset(seed, unit, shift, normalise):
    rewards = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved, expected = NORMALISERS[normalise]((rewards + shift) * unit), NORMALISERS[normalise](rewards)
    expected = expected * unit if normalise == "none" else expected
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6 * (unit if normalise == "none" else 1))


@pytest.mark.parametrize("normalise", NORMALISERS)
@pytest.mark.parametrize("unit", [1e6, 1e-6])
def test_every_norm_is_finite_on_any_scale(normalise, unit):
    assert NORMALISERS[normalise](unit * torch.randn(3, 8)).isfinite().all()


def test_best_and_worst_equal_values_computed_by_hand():
    advantage = torch.tensor([[0.5, -1.0, 2.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert best_and_worst(advantage, 1).tolist() == [
        [False, False, True, False, True],
        [True, False, False, False, True],
    ]
    assert best_and_worst(advantage, 2)[0].tolist() == [True, True, True, False, True]
    with pytest.raises(ValueError, match=r"best_of=3 of a group of 5.*<= 2"):
        best_and_worst(advantage, 3)


def test_the_loss_scale_averages_over_the_selected_samples():
    flat = torch.tensor([True, False, False, True, True])
    assert loss_scale(AdvantageConfig(), flat, 8) == 1
    assert loss_scale(AdvantageConfig(drop_zero_std=True), flat, 8) == 5 / 2
    assert loss_scale(AdvantageConfig(drop_zero_std=True), flat.new_ones(5), 8) == 1
    assert loss_scale(AdvantageConfig(drop_zero_std=True, best_of=2), flat, 12) == 5 / 2 * 3


def test_gdpo_equals_values_computed_by_hand():
    # A of each: (-1, 1)/sqrt(2); the sum 2 A + A' over {(0, 1), (5, 9)} and {(3, 1), (2, 2)}
    first, second = torch.tensor([[0.0, 1.0], [5.0, 9.0]]).double(), torch.tensor([[3.0, 1.0], [2.0, 2.0]]).double()
    sums = [value / math.sqrt(2) for value in (-1, 1, -2, 2)]
    advantages = {"a": group_relative(first), "b": group_relative(second)}
    found = batch_standardised_sum(advantages, {"a": 2.0, "b": 1.0})
    expected = torch.tensor(sums).double().reshape(2, 2) / statistics.stdev(sums)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert torch.equal(batch_standardised_sum({"a": torch.zeros(2, 4)}, {"a": 1.0}), torch.zeros(2, 4))


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    prompts=st.integers(1, 5),
    group=st.integers(2, 9),
    normalise=st.sampled_from(sorted(NORMALISERS)),
)
def test_permuting_samples_or_prompts_permutes_advantages(seed, prompts, group, normalise):
    norm = NORMALISERS[normalise]
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts, group, generator=rng, dtype=torch.float64)
    rows, columns = torch.randperm(prompts, generator=rng), torch.randperm(group, generator=rng)
    permuted = norm(rewards[rows][:, columns])
    torch.testing.assert_close(permuted, norm(rewards)[rows][:, columns], rtol=1e-12, atol=1e-12)
    if group >= 4:
        torch.testing.assert_close(best_and_worst(permuted, 2), best_and_worst(norm(rewards), 2)[rows][:, columns])


def test_the_dtype_is_at_least_fp32():
    rewards = torch.randn(2, 4, dtype=torch.float64)
    assert group_relative(rewards).dtype == torch.float64
    assert group_relative(rewards.bfloat16()).dtype == torch.float32


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="group of 1"):
        group_relative(torch.ones(3, 1))


def test_rewards_are_summed_by_weight_and_a_single_reward_of_weight_one_is_unchanged():
    first, second = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, -0.5]])
    assert torch.equal(weighted_sum({"a": first, "b": second}, {"b": 4.0, "a": 2.0}), torch.tensor([[4.0, -4.0]]))
    rewards = torch.randn(3, 7)
    assert torch.equal(weighted_sum({"a": rewards}, {"a": 1.0}), rewards)
    with pytest.raises(ValueError, match=r"'a'.*'b'"):
        weighted_sum({"a": first}, {"b": 1.0})


def test_edges_of_a_tree_have_the_mean_of_the_samples_below_them():
    advantage = torch.tensor([[3.0, 1.0, -1.0, -3.0], [1.0, -1.0, 1.0, -1.0]])
    assert averaged_below(advantage, 2, rescaled=False).tolist() == [[2.0, 2.0, -2.0, -2.0], [0.0] * 4]
    assert averaged_below(advantage, 4, rescaled=True).tolist() == [[0.0] * 4] * 2
    assert averaged_below(advantage, 1, rescaled=True) is advantage
    scale = math.sqrt((9 + 1 + 1 + 9) / 3) / math.sqrt(4 + 4)  # std of four samples over that of two edges
    expected = [[2 * scale, 2 * scale, -2 * scale, -2 * scale], [0.0] * 4]
    torch.testing.assert_close(averaged_below(advantage, 2, rescaled=True), torch.tensor(expected))
    tied = torch.tensor([[0.1, 0.3, 0.3, 0.1]])  # means that differ by rounding are no signal
    assert averaged_below(tied - tied.mean(), 2, rescaled=True).abs().max() < 1e-6


@given(seed=st.integers(0, 2**31), nodes=st.integers(2, 5), below=st.integers(2, 4), trust=st.floats(0.5, 1.5))
def test_edges_of_grpo_are_normalised_rewards_of_their_depth(seed, nodes, below, trust):
    """BranchGRPO (arXiv 2509.06040): means of rewards, less their mean, over their std; times the group's trust."""
    rewards = torch.randn(2, nodes * below, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fused = rewards.unflatten(1, (nodes, below)).mean(dim=2)
    advantage = group_relative(rewards)  # its std is 1 but for the constant beside the divisor
    normalised = (fused - fused.mean(dim=1, keepdim=True)) / fused.std(dim=1, keepdim=True)
    expected = (normalised * advantage.std(dim=1, keepdim=True)).repeat_interleave(below, dim=1)
    found = averaged_below(trust * advantage, below, rescaled=True)
    torch.testing.assert_close(found, trust * expected, rtol=1e-6, atol=1e-9)


def test_clipping_takes_one_limit_or_one_per_prompt():
    advantage = torch.tensor([[-3.0, 1.0], [3.0, -1.0]])
    assert clip_advantages(advantage, 2.0).tolist() == [[-2.0, 1.0], [2.0, -1.0]]
    assert clip_advantages(advantage, torch.tensor([[2.0], [0.5]])).tolist() == [[-2.0, 1.0], [0.5, -0.5]]
    with pytest.raises(ValueError, match="limit=0"):
        clip_advantages(advantage, 0.0)


def test_groups_without_signal_are_detected():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    assert equal_groups(rewards).tolist() == [True, False, True, False]
