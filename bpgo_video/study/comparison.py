"""Paired comparison of arms: the same seeds, hence the same worlds, samples and noise.

unit       a seed: d_s = gain of the arm - gain of the other, in % of GRPO's mean gain in that regime
interval   `bpgo_video.statistics.interval`, a bootstrap over seeds
test       Wilcoxon's signed-rank test, two-sided, with Holm's correction over all arms and regimes
no effect  two one-sided t-tests (TOST, Schuirmann 1987): p below .05 shows |mean| < the bound
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import stats

from bpgo_video.statistics import LEVEL, interval, signed_rank

Differences = Float[np.ndarray, "seeds"]


@dataclass(frozen=True)
class Difference:
    """An arm's gain minus another's, in % of GRPO's.

    Attributes:
        mean, low, high: over seeds, with the 95 % interval; nan for one seed.
        dz: mean over standard deviation of the seeds' differences; 0 if none differs.
        p_value, p_adjusted: of the signed-rank test, and after Holm's correction.
        p_equivalent: of the test that the mean is within the equivalence bound.
    """

    mean: float
    low: float
    high: float
    dz: float
    p_value: float
    p_adjusted: float
    p_equivalent: float

    @property
    def shown(self) -> int:
        """1 if the arm is shown to gain more, -1 if less: the corrected test and the interval agree; else 0."""
        return 0 if self.p_adjusted >= 1 - LEVEL else int(self.low > 0) - int(self.high < 0)

    @property
    def equivalent(self) -> bool:
        return self.p_equivalent < 1 - LEVEL


def difference(gains: Differences, others: Differences, grpo: Differences, bound: float) -> Difference:
    """The difference of two arms on the same seeds, without a correction of its p value.

    Args:
        grpo: gains of GRPO on these seeds.
        bound: of the equivalence test, in %.
    """
    d = 100 * (gains - others) / grpo.mean()
    low, high = interval(d)
    spread = float(d.std(ddof=1)) if len(d) > 1 else math.nan
    p = signed_rank(d)
    return Difference(
        mean=float(d.mean()),
        low=math.nan if low is None else low,
        high=math.nan if high is None else high,
        dz=float(d.mean()) / spread if spread > 0 else 0.0,
        p_value=p,
        p_adjusted=p,
        p_equivalent=equivalence(d, bound),
    )


def equivalence(differences: Differences, bound: float) -> float:
    """The p value of two one-sided t-tests of |mean| < bound; 1 for one value."""
    n = len(differences)
    if n < 2:
        return 1.0
    error, mean = stats.sem(differences), abs(float(differences.mean()))
    if error == 0:
        return 0.0 if mean < bound else 1.0
    return float(stats.t.sf((bound - mean) / error, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: max over smaller ones of (m - rank) p, at most 1."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return [float(p) for p in adjusted[np.argsort(order, kind="stable")]]


def corrected(table: Mapping[tuple[str, str], Difference]) -> dict[tuple[str, str], Difference]:
    """The differences with Holm's correction over all of them."""
    adjusted = holm([cell.p_value for cell in table.values()])
    return {key: replace(cell, p_adjusted=p) for (key, cell), p in zip(table.items(), adjusted, strict=True)}
