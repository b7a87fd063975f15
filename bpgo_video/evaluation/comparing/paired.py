"""How far do two models differ on the same prompts, and could that be chance?

The prompt is the unit: d_p = mean_s B[p, s] - mean_s A[p, s]. Samples of one prompt are no independent evidence about
other prompts, so that interval and test are over prompts alone.

    interval   percentile bootstrap over prompts, its level widened by Student's t (Hesterberg, arXiv 1411.5279, 5.4)
    test       Wilcoxon's signed ranks of d_p, two-sided; prompts that tie are ranked and then dropped (Pratt)
    effect     matched-pairs rank-biserial correlation (W+ - W-) / (W+ + W-), from -1 (B always lower) to 1
    family     Holm's step-down over all measures and models of one comparison

A percentile interval of 24 prompts covers the mean in 93 of 100 cases instead of 95, BCa hardly more: widened by
Student's t it holds its level (tests/evaluation/test_paired.py simulates both).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import stats

Scores = Float[np.ndarray, "prompts _"]  # axis 1 is over samples; two models may have unequally many
Differences = Float[np.ndarray, "prompts"]

LEVEL = 0.95
RESAMPLES = 9999
BATCH = 1000  # resamples in memory at once
TIE = 1e-3  # of the scores' standard deviation: rounding of forwards in other batches is below it
SEED = 0  # of the resampling: the same scores give the same interval


@dataclass(frozen=True)
class Effect:
    """What B has over A in one measure.

    Attributes:
        prompts: how many there are.
        mean_a, mean_b, difference: over all prompts, in the measure's own units; the difference is B's less A's.
        low, high: ends of the 95 % interval of the difference; None for a single prompt.
        scale: the standard deviation of all of A's scores, by which differences of several measures are compared.
        p_value: of the signed-rank test.
        p_adjusted: after Holm's correction; None outside a family (breakdowns by tag).
        rank_biserial: the effect's size, -1 to 1.
        wins, ties, losses: prompts on which B's mean is higher, the same, lower.
    """

    prompts: int
    mean_a: float
    mean_b: float
    difference: float
    low: float | None
    high: float | None
    scale: float
    p_value: float
    rank_biserial: float
    wins: int
    ties: int
    losses: int
    p_adjusted: float | None = None

    @property
    def shown(self) -> int:
        """1 where B is shown to be higher, -1 lower, 0 neither: the corrected test and the interval must agree."""
        if self.low is None or self.high is None or self.p_adjusted is None or self.p_adjusted >= 1 - LEVEL:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    @property
    def decimals(self) -> int:
        """How many show two digits of the scale and one more."""
        return 3 if self.scale == 0 else min(8, max(0, 2 - math.floor(math.log10(self.scale))))

    @property
    def relative(self) -> float:
        """The difference as a share of A's mean; nan where that is 0."""
        return self.difference / abs(self.mean_a) if self.mean_a else math.nan


def effect(a: Scores, b: Scores) -> Effect:
    """What B's scores have over A's; both are of the same prompts, at least one, in one order."""
    means_a, means_b = a.mean(axis=1, dtype=np.float64), b.mean(axis=1, dtype=np.float64)
    differences, scale = means_b - means_a, float(a.std(dtype=np.float64))
    low, high = interval(differences)
    ranked = np.where(np.abs(differences) <= TIE * scale, 0.0, differences)
    return Effect(
        prompts=len(a),
        mean_a=float(means_a.mean()),
        mean_b=float(means_b.mean()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        scale=scale,
        p_value=signed_rank(ranked),
        rank_biserial=rank_biserial(ranked),
        wins=int((ranked > 0).sum()),
        ties=int((ranked == 0).sum()),
        losses=int((ranked < 0).sum()),
    )


def interval(differences: Differences) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean over prompts; (None, None) for a single one."""
    n = len(differences)
    if n < 2:
        return None, None
    quantile = math.sqrt(n / (n - 1)) * stats.t.ppf((1 + LEVEL) / 2, n - 1)
    found = stats.bootstrap(
        (differences,),
        np.mean,
        confidence_level=1 - 2 * float(stats.norm.cdf(-quantile)),
        n_resamples=RESAMPLES,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def signed_rank(differences: Differences) -> float:
    """The two-sided p value of Wilcoxon's signed-rank test; 1 where nothing differs."""
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="pratt").pvalue)


def rank_biserial(differences: Differences) -> float:
    """(W+ - W-) / (W+ + W-) over the prompts that differ; 0 where none does."""
    unequal = differences[differences != 0]
    if not len(unequal):
        return 0.0
    ranks = stats.rankdata(np.abs(unequal))
    return float((np.sign(unequal) * ranks).sum() / ranks.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): p_(i) becomes max over j <= i of min(1, (m - j) p_(j)), j from 0."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(order), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def as_family(effects: Sequence[Effect]) -> list[Effect]:
    """The effects with p values that hold for all of them together."""
    adjusted = holm([effect.p_value for effect in effects])
    return [replace(effect, p_adjusted=p) for effect, p in zip(effects, adjusted, strict=True)]


def smallest_p(prompts: int) -> float:
    """What the signed-rank test can say at best, when all prompts differ in one direction."""
    return min(1.0, 2.0 ** (1 - prompts))
