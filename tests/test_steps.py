"""Are the right denoising steps trained, and does every update get a fair share of them?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.steps import STEP_SELECTIONS, split_updates


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(deadline=None)  # a first call into torch may take long
@given(num_steps=st.integers(2, 60), fraction=st.floats(0.01, 1), seed=st.integers(0, 2**31))
def test_random_steps_are_a_sorted_share_without_the_last(num_steps, fraction, seed):
    steps = STEP_SELECTIONS["random"](num_steps, fraction, generator(seed))
    assert list(steps) == sorted(set(steps))
    assert set(steps) <= set(range(num_steps - 1))
    assert len(steps) == max(1, round(fraction * (num_steps - 1)))
    assert steps == STEP_SELECTIONS["random"](num_steps, fraction, generator(seed))


def test_random_steps_choose_every_step_alike():
    rng, counts = generator(), torch.zeros(10)
    for _ in range(2000):
        counts[list(STEP_SELECTIONS["random"](11, 0.3, rng))] += 1
    # each of 10 steps is in a draw with p = .3: 600 expected, std sqrt(2000 * .3 * .7) = 20.5
    assert (counts - 600).abs().max() < 5 * 20.5


def test_all_steps_leave_out_the_last_only():
    assert STEP_SELECTIONS["all"](5, 1.0, generator()) == (0, 1, 2, 3)


def test_updates_are_dealt_round_robin():
    assert split_updates((0, 1, 2, 3, 4), 2) == [(0, 2, 4), (1, 3)]
    assert split_updates((2, 5, 9), 3) == [(2,), (5,), (9,)]


@settings(deadline=None)
@given(steps=st.sets(st.integers(0, 40), min_size=1), data=st.data())
def test_every_trained_step_is_in_one_update_and_shares_differ_by_at_most_one(steps, data):
    updates = split_updates(sorted(steps), data.draw(st.integers(1, len(steps))))
    assert sorted(step for update in updates for step in update) == sorted(steps)
    sizes = [len(update) for update in updates]
    assert max(sizes) - min(sizes) <= 1


def test_errors_name_the_value_and_the_way_out():
    with pytest.raises(ValueError, match=r"updates_per_rollout=4 with 3 trained steps.*1\.\.3"):
        split_updates((0, 1, 2), 4)
    with pytest.raises(ValueError, match="num_steps=1"):
        STEP_SELECTIONS["all"](1, 1.0, generator())
    with pytest.raises(ValueError, match="fraction=0"):
        STEP_SELECTIONS["random"](8, 0.0, generator())
