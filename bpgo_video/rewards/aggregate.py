"""Aggregates of frame scores: a table of functions from a video's frame scores to the video's score.

Scores are oriented: higher is better. `at` is the recipe's `aggregate_at`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Aggregate = Callable[[Float[Tensor, "samples scored"], float], Float[Tensor, "samples"]]


def mean(scores: Float[Tensor, "samples scored"], at: float) -> Float[Tensor, "samples"]:
    return scores.mean(dim=1)


def worst(scores: Float[Tensor, "samples scored"], at: float) -> Float[Tensor, "samples"]:
    """Score of the worst frame."""
    return scores.amin(dim=1)


def soft_min(scores: Float[Tensor, "samples scored"], at: float) -> Float[Tensor, "samples"]:
    """-at log mean exp(-scores/at), in the score's units: the minimum as `at` goes to 0, the mean as it grows."""
    return -at * (torch.logsumexp(-scores / at, dim=1) - math.log(scores.shape[1]))


def top_share(scores: Float[Tensor, "samples scored"], at: float) -> Float[Tensor, "samples"]:
    """Mean of the best share `at` of the frames, at least one."""
    count = max(1, round(at * scores.shape[1]))
    return scores.topk(count, dim=1).values.mean(dim=1)


def share_above(scores: Float[Tensor, "samples scored"], at: float) -> Float[Tensor, "samples"]:
    """Share of the frames with a score above `at`."""
    return (scores > at).float().mean(dim=1)


AGGREGATES: dict[str, Aggregate] = {
    "mean": mean,
    "min": worst,
    "soft_min": soft_min,
    "top_share": top_share,
    "share_above": share_above,
}
