"""How do the scores of a video's frames become the video's score? Functions in a table.

Scores come oriented: higher is better. `at` is each function's own number; see AGGREGATES.
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
    """The worst frame's."""
    return scores.amin(dim=1)


def soft_min(scores: Float[Tensor, "samples scored"], at: float) -> Float[Tensor, "samples"]:
    """-at log mean exp(-scores/at): the worst frame's as `at` goes to 0, the mean as it grows; in the score's units."""
    return -at * (torch.logsumexp(-scores / at, dim=1) - math.log(scores.shape[1]))


def top_share(scores: Float[Tensor, "samples scored"], at: float) -> Float[Tensor, "samples"]:
    """Mean of the best share `at` of the frames, at least one."""
    count = max(1, round(at * scores.shape[1]))
    return scores.topk(count, dim=1).values.mean(dim=1)


def share_above(scores: Float[Tensor, "samples scored"], at: float) -> Float[Tensor, "samples"]:
    """Share of the frames whose score is above `at`."""
    return (scores > at).float().mean(dim=1)


AGGREGATES: dict[str, Aggregate] = {
    "mean": mean,
    "min": worst,
    "soft_min": soft_min,
    "top_share": top_share,
    "share_above": share_above,
}
