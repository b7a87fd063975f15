"""The study's statistics against hand-computed numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bpgo_video.study.comparison import corrected, difference, equivalence, holm


def test_differences_are_in_percent_of_grpos_mean_gain() -> None:
    grpo = np.array([1.0, 2.0, 3.0])
    found = difference(grpo + np.array([0.02, 0.04, 0.06]), grpo, grpo, bound=2.0)
    assert found.mean == pytest.approx(2.0)  # .04 of 2
    assert found.dz == pytest.approx(2.0)  # 1, 2, 3: mean 2, standard deviation 1
    assert found.low < 2.0 < found.high
    assert found.p_value == pytest.approx(0.25)  # of 8 assignments of signs, the two extreme ones


def test_equal_arms_do_not_differ_and_are_equivalent() -> None:
    gains = np.array([1.0, 2.0, 3.0])
    found = difference(gains, gains, gains, bound=2.0)
    assert (found.mean, found.low, found.high, found.dz, found.p_value) == (0, 0, 0, 0, 1)
    assert (found.shown, found.equivalent) == (0, True)
    assert math.isnan(difference(gains[:1], gains[:1], gains[:1], bound=2.0).low)


def test_holm_steps_down_and_keeps_the_order() -> None:
    # Sorted .01, .02, .03, .5: times 4, 3, 2, 1 is .04, .06, .06, .5, each at least the one before it.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_equivalence_is_the_worse_of_two_one_sided_tests() -> None:
    d = np.array([0.3, -0.4, 0.9, 1.2, -0.1, 0.5])
    low = stats.ttest_1samp(d, -2.0, alternative="greater").pvalue
    high = stats.ttest_1samp(d, 2.0, alternative="less").pvalue
    assert equivalence(d, 2.0) == pytest.approx(max(low, high))
    assert equivalence(d + 3, 2.0) > 0.5
    assert equivalence(np.zeros(1), 2.0) == 1


def test_a_difference_is_shown_only_after_the_correction() -> None:
    rng, grpo = np.random.default_rng(0), np.ones(24)
    clear = difference(grpo + 0.03 + 0.01 * rng.standard_normal(24), grpo, grpo, 2.0)
    faint = difference(grpo + 0.004 + 0.01 * rng.standard_normal(24), grpo, grpo, 2.0)
    table = corrected({("a", "clear"): clear, **{("a", str(i)): faint for i in range(40)}})
    assert table["a", "clear"].shown == 1
    assert table["a", "0"].p_adjusted > faint.p_value
    assert table["a", "0"].shown == 0
    down = difference(grpo - 0.03 + 0.01 * rng.standard_normal(24), grpo, grpo, 2.0)
    assert corrected({("a", "b"): down})["a", "b"].shown == -1
