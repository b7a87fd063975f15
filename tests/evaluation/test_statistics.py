"""Paired statistics: formulas against independent implementations, and error rates on real held-out scores.

`oracle_scores.json` is the population: scores of the embedded policy and of a post-trained one, with their provenance.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from bpgo_video import statistics
from bpgo_video.statistics import (
    corrected,
    effect,
    interval,
    rank_biserial,
    shown,
    signed_rank,
    too_few,
)

POPULATION = json.loads((Path(__file__).parent / "oracle_scores.json").read_text())
BASE, TRAINED = ({name: np.array(rows) for name, rows in POPULATION[side].items()} for side in ("base", "trained"))
PROMPTS, SAMPLES = BASE["oracle"].shape


def draws(prompts: int, repetitions: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.random.Generator]]:
    """Rows of random prompts, and for each a random order of its samples."""
    rng = np.random.default_rng(prompts)
    for _ in range(repetitions):
        rows = rng.choice(PROMPTS, prompts, replace=False)[:, None]
        yield rows, np.argsort(rng.random((prompts, SAMPLES)), axis=1), rng


@pytest.mark.parametrize("prompts", [24, 48])
def test_a_null_comparison_has_at_most_10_false_alarms_in_100(prompts: int) -> None:
    """One checkpoint with two seeds; a false alarm is any measure with `shown` not 0."""
    alarms = 0
    for rows, columns, _ in draws(prompts, 100):
        first, second = columns[:, :4], columns[:, 4:8]
        found = [effect(scores[rows, first], scores[rows, second]) for scores in BASE.values()]
        alarms += any(corrected(one, len(BASE)).shown for one in found)
    assert alarms <= 10


def test_an_improvement_of_5_hundredths_is_found_in_80_of_100() -> None:
    """48 prompts x 4 samples, same seeds: a share of B's videos is the trained policy's, for a mean gain of .05."""
    share = 0.05 / (TRAINED["oracle"] - BASE["oracle"]).mean()
    found, gains = 0, []
    for rows, columns, rng in draws(48, 100):
        own = rows, columns[:, :4]
        taken = rng.random((48, 4)) < share
        mixed = np.where(taken, TRAINED["oracle"][own], BASE["oracle"][own])
        one = corrected(effect(BASE["oracle"][own], mixed), len(BASE))
        gains.append(one.difference)
        found += one.shown == 1
    assert np.mean(gains) == pytest.approx(0.05, abs=0.005)
    assert found >= 80


def test_the_interval_has_its_nominal_coverage_at_24_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 intervals, 95 % cover the mean, within three standard errors; BCa covers it less often."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)
    rng = np.random.default_rng(3)
    population = (TRAINED["oracle"] - BASE["oracle"])[:, :4].mean(axis=1)
    covered = {"ours": 0, "BCa": 0}
    for _ in range(1000):
        sample = rng.choice(population, 24)
        bca = stats.bootstrap((sample,), np.mean, n_resamples=999, method="BCa", rng=rng).confidence_interval
        for name, (low, high) in {"ours": interval(sample), "BCa": bca}.items():
            assert low is not None
            assert high is not None
            covered[name] += low <= population.mean() <= high
    assert covered["ours"] / 1000 == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / 1000) ** 0.5)
    assert covered["BCa"] < covered["ours"]


def test_an_effect_equals_values_computed_by_hand() -> None:
    """Differences of 1, -3, 0, 4 and 8: W+ is 1 + 3 + 4, and W+ + W- is 10."""
    a = np.array([[0.0, 2.0], [4.0, 6.0], [1.0, 1.0], [0.0, 0.0], [3.0, 5.0]])
    found = effect(a, a + np.array([1.0, -3.0, 0.0, 4.0, 8.0])[:, None])
    assert (found.prompts, found.wins, found.ties, found.losses) == (5, 3, 1, 1)
    assert (found.mean_a, found.mean_b, found.difference) == (2.2, 4.2, 2.0)
    assert found.scale == pytest.approx(a.std())
    assert found.rank_biserial == pytest.approx((1 + 3 + 4 - 2) / 10)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 2.0 < found.high


def test_the_signed_rank_p_value_equals_that_of_all_sign_flips() -> None:
    differences = np.array([0.3, -0.1, 0.7, 0.45, 0.9, 0.2])
    ranks = stats.rankdata(np.abs(differences))
    observed = (np.sign(differences) * ranks).sum()
    flips = [(np.array(signs) * ranks).sum() for signs in itertools.product((-1, 1), repeat=6)]
    assert signed_rank(differences) == pytest.approx(np.mean(np.abs(flips) >= abs(observed)))
    assert signed_rank(np.abs(differences)) == pytest.approx(2 / 2**6)


def test_the_detectable_difference_is_found_in_80_of_100() -> None:
    """A gain of that size in scores of one checkpoint with two seeds."""
    found = 0
    for rows, columns, _ in draws(48, 100):
        first, second = BASE["oracle"][rows, columns[:, :4]], BASE["oracle"][rows, columns[:, 4:8]]
        gain = corrected(effect(first, second), 5).detectable
        assert gain is not None
        found += corrected(effect(first, second + gain), 5).shown == 1
    assert found / 100 == pytest.approx(0.8, abs=0.1)


def test_a_model_equals_itself_and_rounding_errors_are_ties() -> None:
    scores = BASE["oracle"]
    same = corrected(effect(scores, scores), 1)
    assert (same.difference, same.p_value, same.ties, same.shown) == (0.0, 1.0, PROMPTS, 0)
    rounded = corrected(effect(scores, scores + 1e-6), 1)
    assert (rounded.p_value, rounded.ties, rounded.rank_biserial, rounded.shown) == (1.0, PROMPTS, 0.0, 0)


def test_a_single_prompt_shows_nothing() -> None:
    found = corrected(effect(np.zeros((1, 4)), np.ones((1, 4))), 1)
    assert (found.low, found.high, found.shown, found.difference) == (None, None, 0, 1.0)


@settings(max_examples=20, deadline=None)
@example(4, 4, 255)  # a difference between the ties of the one's spread and of the other's
@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 1000))
def test_swapping_the_models_flips_every_sign(prompts: int, samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, prompts, samples))
    forth, back = effect(a, b), effect(b, a)
    assert (back.wins, back.ties, back.losses) == (forth.losses, forth.ties, forth.wins)
    assert back.difference == pytest.approx(-forth.difference)
    assert back.p_value == pytest.approx(forth.p_value)
    assert back.rank_biserial == pytest.approx(-forth.rank_biserial)
    assert (back.low, back.high) == (pytest.approx(-(forth.high or 0)), pytest.approx(-(forth.low or 0)))


def test_rank_biserial_ranges_from_minus_one_to_one() -> None:
    assert rank_biserial(np.array([1.0, 2.0])) == 1.0
    assert rank_biserial(np.array([-1.0, -2.0])) == -1.0
    assert rank_biserial(np.zeros(3)) == 0.0


@pytest.mark.parametrize(
    ("p", "low", "high", "expected"),
    [(0.01, 0.1, 1.0, 1), (0.01, -1.0, -0.1, -1), (0.06, 0.1, 1.0, 0), (0.01, -0.1, 1.0, 0), (0.01, None, None, 0)],
)
def test_shown_requires_the_interval_and_the_corrected_test(
    p: float, low: float | None, high: float | None, expected: int
) -> None:
    assert shown(replace(effect(np.zeros((2, 1)), np.ones((2, 1))), low=low, high=high), p) == expected


def test_few_prompts_cannot_show_a_difference() -> None:
    """2 / 2^n times the number of measures is below .05 from 6 prompts for one measure, and from 9 for seven."""
    assert [too_few(prompts, 1) for prompts in (5, 6)] == [True, False]
    assert [too_few(prompts, 7) for prompts in (8, 9)] == [True, False]
    gains = np.arange(8.0)[:, None]
    assert corrected(effect(gains, 2 * gains), 7).detectable is None


def test_a_single_effect_uses_the_correction_of_its_family() -> None:
    """If all 12 prompts gain, p is 2 / 2^12; adjusted, 7 times that, and at most 1."""
    gained = effect(np.zeros((12, 1)), 1 + np.arange(12.0)[:, None])
    assert corrected(gained, 7).p_adjusted == pytest.approx(14 / 2**12)
    assert (corrected(gained, 7).shown, corrected(gained, 1000).shown) == (1, 0)
    assert corrected(gained, 10000).p_adjusted == 1.0


def test_a_difference_is_printed_with_two_digits_of_the_scale() -> None:
    found = replace(effect(np.zeros((2, 1)), np.zeros((2, 1))), scale=0.25, difference=-0.0361, low=-0.2, high=0.1)
    assert str(found) == "-0.036 [-0.200, +0.100]"
    assert str(replace(found, low=None, high=None, scale=30.0)) == "-0.0"
