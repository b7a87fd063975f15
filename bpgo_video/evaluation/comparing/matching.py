"""At the same training reward, which of two runs has the better held-out scores?

A run that trained longer, or at a higher learning rate, has more of what it was trained on; whether it also paid more
for it is seen where the rewards are equal. Run A's curve goes through its starting policy and its checkpoints; where it
first crosses B's training reward, between checkpoints i and i + 1,

    t = (r_B - r_i) / (r_{i+1} - r_i),    h_A[p] = (1 - t) h_i[p] + t h_{i+1}[p]

and B's held-out scores are compared with h_A prompt by prompt. r is a mean over prompts and samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from bpgo_video.evaluation.comparing.paired import Effect, Scores, effect


@dataclass(frozen=True)
class Point:
    """A policy on a run's way.

    Attributes:
        step: finished training steps; 0 is the start.
        reward: training rewards.
        heldout: held-out scores by measure.
    """

    step: int
    reward: Scores
    heldout: Mapping[str, Scores]


@dataclass(frozen=True)
class Match:
    """Where a run's curve has another model's training reward, and what the other has over it there.

    Attributes:
        step: between checkpoints, by interpolation.
        reward: the training reward of both.
        effects: by held-out measure; positive where the other model is higher.
    """

    step: float
    reward: float
    effects: Mapping[str, Effect]


def matched(curve: Sequence[Point], other: Point) -> Match | None:
    """The first crossing of a curve, in the order of its steps, with another model's training reward; None if none."""
    reward = float(other.reward.mean())
    for before, after in pairwise(curve):
        low, high = float(before.reward.mean()), float(after.reward.mean())
        if low != high and min(low, high) <= reward <= max(low, high):
            share = (reward - low) / (high - low)
            effects = {
                name: effect(between(before.heldout[name], after.heldout[name], share), scores)
                for name, scores in other.heldout.items()
            }
            return Match(before.step + share * (after.step - before.step), reward, effects)
    return None


def between(before: Scores, after: Scores, share: float) -> Float[np.ndarray, "prompts 1"]:
    """Each prompt's mean, a share of the way from one checkpoint to the next."""
    return (1 - share) * before.mean(axis=1, keepdims=True) + share * after.mean(axis=1, keepdims=True)
