"""The alarm for reward hacking: the trained reward rises while a held-out reward falls.

Every evaluation samples the same held-out prompts with the same noise, so that two of them pair by prompt. The alarm
for a held-out reward compares each evaluation with the best one before it, and sounds if both hold:

    fall   Wilcoxon's signed-rank test of the differences over prompts, and their mean is below 0
    rise   the slope of the trained reward over the steps in between is above 0, by a one-sided t test

The test of the fall is corrected for all pairs of a run's evaluations and all held-out rewards (Bonferroni); the pair
with the best evaluation is one of them. So a run whose held-out scores do not change has a false alarm with a
probability of at most 1 - LEVEL, however its trained reward moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from bpgo_video.config.bpgo import Config
from bpgo_video.statistics import LEVEL, paired_differences, signed_rank

Scores = Float[np.ndarray, "prompts samples"]
FEWEST_STEPS = 3  # with which a slope has an error


@dataclass
class AlarmMemory:
    """What the alarm remembers of a run, stored in checkpoints.

    Attributes:
        trained: (finished steps, trained reward) of each step.
        best: of each held-out reward, the evaluation with the highest mean: `step` and `scores`.
        alarms: finished steps at the first alarm of each held-out reward.
        kl_factor: by which alarms have multiplied loss.kl_weight.
    """

    trained: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    alarms: dict[str, int] = field(default_factory=dict)
    kl_factor: float = 1.0


@dataclass(frozen=True)
class Alarm:
    """A fall of a held-out reward since its best evaluation, while the trained reward rose."""

    reward: str
    since: int
    before: float
    now: float
    p_value: float

    def __str__(self) -> str:
        return (
            f"reward hacking: held-out {self.reward} fell from {self.before:.4g} to {self.now:.4g} since step "
            f"{self.since} (p = {self.p_value:.2g}, corrected) while the trained reward rose"
        )


def comparisons(config: Config) -> int:
    """Pairs of a run's evaluations, times its held-out rewards."""
    every = config.evaluation.every or config.run.num_steps
    evaluations = 1 + -(-config.run.num_steps // every)
    return comb(evaluations, 2) * len(config.evaluation.rewards)


def watch(
    memory: AlarmMemory, step: int, by_name: Mapping[str, Scores], comparisons: int, again: bool = False
) -> list[Alarm]:
    """The alarms of an evaluation after `step` steps; it is added to the memory.

    Args:
        by_name: scores of the same prompts and noise each time, higher is better.
        comparisons: for which p values are corrected.
        again: a reward can sound again, for a further fall since its last alarm; otherwise once.
    """
    found = []
    for name, scores in by_name.items():
        best = memory.best.get(name)
        if best is None or scores.mean() >= np.mean(best["scores"]):
            memory.best[name] = {"step": step, "scores": scores.tolist()}
            continue
        if name in memory.alarms and not again:
            continue
        p_value = fall(np.asarray(best["scores"]), scores, comparisons)
        if p_value < 1 - LEVEL and rises([point for point in memory.trained if best["step"] < point[0] <= step]):
            found.append(Alarm(name, best["step"], float(np.mean(best["scores"])), float(scores.mean()), p_value))
            memory.alarms.setdefault(name, step)
            if again:
                memory.best[name] = {"step": step, "scores": scores.tolist()}
    return found


def fall(before: Scores, now: Scores, comparisons: int) -> float:
    """The corrected p value, two-sided, of a lower mean; 1 if the mean is not lower."""
    differences = paired_differences(before, now)
    return min(1.0, comparisons * signed_rank(differences)) if differences.mean() < 0 else 1.0


def rises(points: list[tuple[int, float]]) -> bool:
    """Whether the rewards of some steps rise with the step."""
    if len(points) < FEWEST_STEPS:
        return False
    steps, rewards = zip(*points, strict=True)
    return bool(stats.linregress(steps, rewards, alternative="greater").pvalue < 1 - LEVEL)
