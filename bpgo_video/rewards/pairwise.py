"""Win rates of samples in their group, from comparisons of two samples (Pref-GRPO, arXiv 2508.20751); pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import gcd

import torch
from jaxtyping import Float
from torch import Tensor

Pair = tuple[int, int]
STRIDE = 0.38  # of a group, about how far apart neighbours on the circle are: 1 less the golden ratio


def pairs(size: int, opponents: int | None = None) -> list[Pair]:
    """Pairs of a group in which every sample meets equally many others: all others, or `opponents`.

    On a circle of the samples, each meets its nearest others. Neighbours on the circle are far apart in number, since
    successive samples of a tree are the most similar ones.

    Raises:
        ValueError: a group of one sample, or no such pairs: `opponents` must be from 1 to size - 1, and even in a group
            of odd size.
    """
    if size < 2:
        raise ValueError(f"a group of {size} sample has no pairs; a reward that compares samples needs two or more")
    if opponents is None or opponents == size - 1:
        return list(combinations(range(size), 2))
    if not 0 < opponents < size or opponents * size % 2:
        rule = f"it must be from 1 to {size - 1}{', and even' if size % 2 else ''}, or left out for all others"
        raise ValueError(f"opponents is {opponents} in a group of {size} samples; {rule}")
    stride = next(step for step in range(max(1, round(STRIDE * size)), size) if gcd(step, size) == 1)
    distances = [*range(1, opponents // 2 + 1), *([size // 2] if opponents % 2 else [])]
    circle = {((i * stride) % size, ((i + distance) * stride) % size) for i in range(size) for distance in distances}
    return sorted({(min(pair), max(pair)) for pair in circle})


def win_rates(
    size: int, met: Sequence[Pair], first_wins: Float[Tensor, "pairs orders"]
) -> tuple[Float[Tensor, "samples"], Float[Tensor, "samples"]]:
    """The mean probability of each sample to win its comparisons, and its std as if each answer was drawn.

    r_i = mean_a p_a and sqrt(sum_a p_a (1 - p_a))/n over the n answers about sample i: of each of its pairs, in each
    order. The mean of r over a group in which all meet equally many others is 1/2.

    Args:
        first_wins: probability that the first sample of each pair is better, by each answer.
    """
    rates, variances, answers = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    for row, found in zip(met, first_wins.double(), strict=True):
        for sample, won in zip(row, (found, 1 - found), strict=True):
            rates[sample] += won.sum()
            variances[sample] += (won * (1 - won)).sum()
            answers[sample] += len(won)
    return (rates / answers).float(), (variances.sqrt() / answers).float()
