"""Paired statistics of two models on the same prompts.

The prompt is the unit of observation: d_p = mean_s B[p, s] - mean_s A[p, s]. More samples of one prompt do not tell how
other prompts behave, so the interval and the test are over prompts.

    interval   percentile bootstrap over prompts, widened by Student's t (Hesterberg, arXiv 1411.5279, 5.4)
    test       Wilcoxon's signed-rank test of d_p, two-sided; ties are ranked and then dropped (Pratt)
    effect     matched-pairs rank-biserial correlation (W+ - W-) / (W+ + W-), from -1 (B always lower) to 1
    family     Bonferroni's correction: p times the number of measures and models of one comparison. It needs only the
               measure itself, so that a run and `evaluate compare` give the same verdict about the same scores

A plain percentile interval of 24 prompts covers the mean in 93 % of cases instead of 95 %, and BCa is hardly better;
the widened interval has its nominal coverage (tests/evaluation/test_statistics.py simulates both).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from jaxtyping import Float
from scipy import stats

Scores = Float[np.ndarray, "prompts _"]  # axis 1: samples, of which two models may have different numbers
Differences = Float[np.ndarray, "prompts"]

LEVEL = 0.95
RESAMPLES = 9999
BATCH = 1000  # resamples in memory at once
POWER = 0.8  # share of repetitions in which a difference of `Effect.detectable` is shown
TIE = 1e-3  # of the scores' standard deviation; rounding differences between batch sizes are smaller
SEED = 0  # of the bootstrap, so that the same scores give the same interval


@dataclass(frozen=True)
class Effect:
    """The difference between B and A in one measure.

    Attributes:
        prompts: number of prompts.
        mean_a, mean_b, difference: over all prompts, in the measure's units; the difference is B minus A.
        low, high: limits of the 95 % interval of the difference; None for a single prompt.
        scale: standard deviation of all of A's scores; the unit in which measures are compared.
        p_value: of the signed-rank test.
        p_adjusted: after the correction; None for breakdowns by tag, which are not corrected.
        rank_biserial: effect size, -1 to 1.
        wins, ties, losses: numbers of prompts on which B's mean is higher, the same, lower.
        stderr: standard error of the difference over prompts; None for a single prompt.
        detectable: true difference that the corrected test shows in a share of POWER of all repetitions; None without
            a correction, and if no difference can be shown.
        shown: 1 if B is shown to be higher, -1 if lower (the corrected test and the interval must agree), else 0.
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
    stderr: float | None = None
    p_adjusted: float | None = None
    shown: int = 0
    detectable: float | None = None

    @property
    def decimals(self) -> int:
        """Decimals that show three significant digits of the scale."""
        return 3 if self.scale == 0 else min(8, max(0, 2 - math.floor(math.log10(self.scale))))

    @property
    def interval(self) -> str:
        """The interval as text; empty for a single prompt."""
        if self.low is None or self.high is None:
            return ""
        return f"[{self.low:+.{self.decimals}f}, {self.high:+.{self.decimals}f}]"

    def __str__(self) -> str:
        """The difference with its interval."""
        return f"{self.difference:+.{self.decimals}f} {self.interval}".rstrip()


def effect(a: Scores, b: Scores) -> Effect:
    """The difference between B's and A's scores of the same prompts (at least one) in the same order."""
    means_a, means_b = a.mean(axis=1, dtype=np.float64), b.mean(axis=1, dtype=np.float64)
    differences, scale = means_b - means_a, float(a.std(dtype=np.float64))
    low, high = interval(differences)
    ranked = paired_differences(a, b)
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
        stderr=float(stats.sem(differences)) if len(a) > 1 else None,
    )


def paired_differences(a: Scores, b: Scores) -> Differences:
    """B's mean minus A's on each prompt, as the tests take them: 0 within TIE of the scores' spread."""
    differences = b.mean(axis=1, dtype=np.float64) - a.mean(axis=1, dtype=np.float64)
    spread = max(float(a.std(dtype=np.float64)), float(b.std(dtype=np.float64)))  # the same for either order
    return np.where(np.abs(differences) <= TIE * spread, 0.0, differences)


def interval(differences: Differences) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean over prompts; (None, None) for a single one."""
    n = len(differences)
    if n < 2:
        return None, None
    quantile = math.sqrt(n / (n - 1)) * stats.t.ppf((1 + LEVEL) / 2, n - 1)
    level = 1 - 2 * float(stats.norm.cdf(-quantile))
    sampling = {"n_resamples": RESAMPLES, "batch": BATCH, "rng": np.random.default_rng(SEED)}
    found = stats.bootstrap((differences,), np.mean, confidence_level=level, method="percentile", **sampling)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def signed_rank(differences: Differences) -> float:
    """The two-sided p value of Wilcoxon's signed-rank test; 1 if nothing differs."""
    return float(stats.wilcoxon(differences, zero_method="pratt").pvalue) if differences.any() else 1.0


def rank_biserial(differences: Differences) -> float:
    """(W+ - W-) / (W+ + W-) over the prompts that differ; 0 if none does."""
    unequal = differences[differences != 0]
    ranks = stats.rankdata(np.abs(unequal))
    return float((np.sign(unequal) * ranks).sum() / ranks.sum()) if len(unequal) else 0.0


def corrected(effect: Effect, measures: int) -> Effect:
    """The effect as one of this number of measures: p values, `shown` and `detectable` after the correction."""
    p = min(1.0, measures * effect.p_value)
    return replace(effect, p_adjusted=p, shown=shown(effect, p), detectable=detectable(effect, measures))


def shown(effect: Effect, p: float) -> int:
    if effect.low is None or effect.high is None or p >= 1 - LEVEL:
        return 0
    return int(effect.low > 0) - int(effect.high < 0)


def detectable(effect: Effect, measures: int) -> float | None:
    """(t_{1 - alpha/2} + t_{POWER}) stderr, the two-sided test at alpha = (1 - LEVEL)/measures; None if no difference
    can be shown. Divided by the square root of 3/pi, the signed-rank test's efficiency for normal differences.
    """
    if effect.stderr is None or too_few(effect.prompts, measures):
        return None
    quantiles = stats.t.ppf([1 - (1 - LEVEL) / measures / 2, POWER], effect.prompts - 1)
    return float(quantiles.sum() * effect.stderr / math.sqrt(3 / math.pi))


def too_few(prompts: int, measures: int) -> bool:
    """Whether the corrected test, whose smallest p value is 2 / 2^prompts, cannot show any difference."""
    return measures * 2.0 ** (1 - prompts) >= 1 - LEVEL


def fewest_prompts(measures: int) -> int:
    """The smallest number of prompts with which the corrected test can show a difference."""
    return next(prompts for prompts in count(1) if not too_few(prompts, measures))


def can_show(prompts: int, measures: int, detectable: float | None) -> str:
    """What so many prompts can show, in words; empty if the spread of their differences is unknown."""
    if too_few(prompts, measures):
        return f"{prompts} prompts are too few to show any difference among {measures} measures"
    return f"{prompts} prompts can show a difference of {detectable:.2g} (with {POWER:.0%} power)" if detectable else ""
