"""Are advantages relative to the group, exactly 0 where it is flat, and independent of the order of samples?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.advantages import clip_advantages, combine, group_relative, zero_std_share


def test_group_relative_by_hand():
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


@settings(deadline=None)  # a first call into torch may take long
@given(seed=st.integers(0, 2**31), prompts=st.integers(1, 5), group=st.integers(2, 9))
def test_permuting_samples_or_prompts_permutes_advantages(seed, prompts, group):
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts, group, generator=rng, dtype=torch.float64)
    rows, columns = torch.randperm(prompts, generator=rng), torch.randperm(group, generator=rng)
    permuted = group_relative(rewards[rows][:, columns])
    torch.testing.assert_close(permuted, group_relative(rewards)[rows][:, columns], rtol=1e-12, atol=1e-12)


def test_dtype_is_fp32_at_least():
    rewards = torch.randn(2, 4, dtype=torch.float64)
    assert group_relative(rewards).dtype == torch.float64
    assert group_relative(rewards.bfloat16()).dtype == torch.float32


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="group of 1"):
        group_relative(torch.ones(3, 1))


def test_combine_is_the_weighted_sum_and_one_reward_of_weight_one_is_untouched():
    first, second = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, -0.5]])
    assert torch.equal(combine({"a": first, "b": second}, {"b": 4.0, "a": 2.0}), torch.tensor([[4.0, -4.0]]))
    rewards = torch.randn(3, 7)
    assert torch.equal(combine({"a": rewards}, {"a": 1.0}), rewards)
    with pytest.raises(ValueError, match=r"'a'.*'b'"):
        combine({"a": first}, {"b": 1.0})


def test_clip_with_one_limit_or_one_per_prompt():
    advantage = torch.tensor([[-3.0, 1.0], [3.0, -1.0]])
    assert clip_advantages(advantage, 2.0).tolist() == [[-2.0, 1.0], [2.0, -1.0]]
    assert clip_advantages(advantage, torch.tensor([[2.0], [0.5]])).tolist() == [[-2.0, 1.0], [0.5, -0.5]]
    with pytest.raises(ValueError, match="limit=0"):
        clip_advantages(advantage, 0.0)


def test_zero_std_share_counts_flat_groups():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    assert zero_std_share(rewards) == 0.5
