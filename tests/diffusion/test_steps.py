"""Selection of the trained denoising steps, their weights, and their distribution over optimizer updates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.diffusion.sde import SAMPLERS, shifted_sigmas, steps_of
from bpgo_video.diffusion.steps import STEP_SELECTIONS, STEP_WEIGHTS, split_updates, step_weights


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(deadline=None)  # the first call into torch may be slow
@given(num_steps=st.integers(2, 60), data=st.data(), seed=st.integers(0, 2**31))
def test_random_steps_are_a_sorted_subset_without_the_last_step(num_steps, data, seed):
    count = data.draw(st.integers(1, num_steps - 1))
    steps = STEP_SELECTIONS["random"](num_steps, count, 0, generator(seed))
    assert list(steps) == sorted(set(steps))
    assert set(steps) <= set(range(num_steps - 1))
    assert len(steps) == count
    assert steps == STEP_SELECTIONS["random"](num_steps, count, 0, generator(seed))


@pytest.mark.parametrize("name", ["window", "random_window"])
@settings(deadline=None)
@given(num_steps=st.integers(2, 30), data=st.data(), start=st.integers(0, 100))
def test_a_window_is_a_contiguous_range_of_trainable_steps(name, num_steps, data, start):
    count = data.draw(st.integers(1, num_steps - 1))
    steps = STEP_SELECTIONS[name](num_steps, count, start, generator(start))
    assert list(steps) == list(range(steps[0], steps[0] + count))
    assert steps[-1] < num_steps - 1


def test_a_window_moves_from_noise_to_data_and_wraps_around():
    places = [STEP_SELECTIONS["window"](6, 2, start, generator()) for start in range(5)]
    assert places == [(0, 1), (1, 2), (2, 3), (3, 4), (0, 1)]


def test_a_random_window_is_uniform_over_positions():
    rng, counts = generator(), torch.zeros(6)
    for _ in range(3000):
        counts[STEP_SELECTIONS["random_window"](9, 3, 0, rng)[0]] += 1
    assert (counts - 500).abs().max() < 5 * 20.4  # std sqrt(3000 / 6 * 5 / 6)


@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde", "cps", "sage", "truncated"])
@pytest.mark.parametrize("name", sorted(STEP_WEIGHTS))
def test_step_weights_are_positive_with_a_mean_of_one(name, sampler):
    weights = step_weights(name, SAMPLERS[sampler], steps_of(shifted_sigmas(8, 3.0)), 0.5)
    assert len(weights) == 7
    assert sum(weights) / 7 == pytest.approx(1, rel=1e-6)
    assert min(weights) > 0


def test_step_weights_equal_values_computed_by_hand():
    # sigmas 1, .8, .5, .2, 0 and eta .7: the third step has sigma .5, dt -.3, g = .7 sqrt(.5/.5)
    step, flow = steps_of(torch.tensor([1, 0.8, 0.5, 0.2, 0], dtype=torch.float64))[2], SAMPLERS["flow_sde"]
    g, dt = 0.7, 0.3
    slope = math.sqrt(dt) / g + g * math.sqrt(dt) * 0.5 / (2 * 0.5)  # lambda of Flash-GRPO for Flow-SDE
    assert STEP_WEIGHTS["flash"](flow, step, 0.7).item() == pytest.approx(1 / slope, rel=1e-6)
    assert STEP_WEIGHTS["longcat"](flow, step, 0.7).item() == pytest.approx(math.sqrt(0.5 / (0.5 * dt)), rel=1e-6)
    assert STEP_WEIGHTS["guard"](flow, step, 0.7).item() == pytest.approx(1 / dt, rel=1e-6)
    assert STEP_WEIGHTS["tempflow"](flow, step, 0.7).item() == pytest.approx(g * math.sqrt(dt), rel=1e-6)


def test_random_steps_are_uniform():
    rng, counts = generator(), torch.zeros(10)
    for _ in range(2000):
        counts[list(STEP_SELECTIONS["random"](11, 3, 0, rng))] += 1
    # each of 10 steps is in a draw with p = .3: 600 expected, std sqrt(2000 * .3 * .7) = 20.5
    assert (counts - 600).abs().max() < 5 * 20.5


def test_all_steps_exclude_only_the_last():
    assert STEP_SELECTIONS["all"](5, 4, 0, generator()) == (0, 1, 2, 3)


def test_steps_are_assigned_to_updates_round_robin():
    assert split_updates((0, 1, 2, 3, 4), 2) == [(0, 2, 4), (1, 3)]
    assert split_updates((2, 5, 9), 3) == [(2,), (5,), (9,)]


@settings(deadline=None)
@given(steps=st.sets(st.integers(0, 40), min_size=1), data=st.data())
def test_every_trained_step_is_in_one_update_and_sizes_differ_by_at_most_one(steps, data):
    updates = split_updates(sorted(steps), data.draw(st.integers(1, len(steps))))
    assert sorted(step for update in updates for step in update) == sorted(steps)
    sizes = [len(update) for update in updates]
    assert max(sizes) - min(sizes) <= 1


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match=r"updates_per_rollout=4 with 3 trained steps.*1\.\.3"):
        split_updates((0, 1, 2), 4)
    with pytest.raises(ValueError, match="num_steps=1"):
        STEP_SELECTIONS["all"](1, 1, 0, generator())
    with pytest.raises(ValueError, match="count=8: of 8 denoising steps, 1 to 7"):
        STEP_SELECTIONS["random"](8, 8, 0, generator())
