"""How far several scores of the same videos agree: intraclass correlations of groups, and the reliability of a mean.

Both follow from the mean squares of a two-way analysis of variance of a group (Shrout and Fleiss, Psychological
Bulletin 86, 1979), with samples j = 1..G as rows and scores f = 1..F as columns, which are scorings, or frames:

    MS_B = F var_j(mean_f y_jf)       MS_R = sum_jf (y_jf - y_j. - y_.f + y..)^2 / ((G - 1)(F - 1))

    of one score        ICC(3,1) = (MS_B - MS_R) / (MS_B + (F - 1) MS_R)
    of the mean of F    ICC(3,F) = 1 - MS_R/MS_B, which is F c/(1 + (F - 1) c) of c = ICC(3,1) (Spearman, Brown)

A constant offset between columns changes neither, as it changes no group-relative advantage.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Scores = Float[Tensor, "prompts group scores"]
PerPrompt = Float[Tensor, "prompts"]


def group_icc(scores: Scores) -> PerPrompt:
    """ICC(3,1) of each group, fp64, at most 1: the reliability of one of its scorings.

    1: the scorings differ by a constant; 0 or below: they disagree on which samples are better. A group whose samples
    all score the same gives 0. With two scorings it is 2 cov / (var + var). For a group of 8 its standard error is
    about .35 (1 - ICC^2).
    """
    return _icc(*_mean_squares(scores), scores.shape[2])


def pooled_icc(scores: Scores) -> Float[Tensor, ""]:
    """ICC(3,1) of the mean squares averaged over prompts: how well one scoring ranks the samples of a group."""
    between, rest = _mean_squares(scores)
    return _icc(between.mean(), rest.mean(), scores.shape[2])


def frame_agreement(frames: Float[Tensor, "prompts group frames"]) -> PerPrompt:
    """rho = clip(1 - MS_R/MS_B, 0, 1) of each group, fp64: the reliability of a video's mean over its scored frames.

    It costs no further scoring. Noise that all frames of a video share raises MS_B alone: rho does not see it.
    """
    between, rest = _mean_squares(frames)
    return torch.where(between > 0, 1 - rest / between, 0.0).clamp(0, 1)


def spearman_brown(icc: PerPrompt, scorings: Int[Tensor, "prompts"] | int) -> PerPrompt:
    """rho = K c/(1 + (K - 1) c): the reliability of the mean of K scorings, c the ICC of one, clamped to [0, 1]."""
    c = icc.double().clamp(0, 1)
    return scorings * c / (1 + (scorings - 1) * c)


def correlation(one: Float[Tensor, "prompts group"], other: Float[Tensor, "prompts group"]) -> PerPrompt:
    """Pearson's correlation of two rewards' scores or advantages within each group; 0 where either is constant."""
    a, b = (scores - scores.mean(dim=1, keepdim=True) for scores in (one, other))
    norms = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(norms > 0, (a * b).sum(dim=1) / norms, 0.0)


def _mean_squares(scores: Scores) -> tuple[PerPrompt, PerPrompt]:
    """MS_B and MS_R; both 0 in a group without spread."""
    _, group, columns = scores.shape
    if group < 2 or columns < 2:
        raise ValueError(f"{group} samples by {columns} scores: agreement needs 2 or more of each")
    scores = scores.double()
    samples, grand = scores.mean(dim=2, keepdim=True), scores.mean(dim=(1, 2), keepdim=True)
    residual = scores - samples - scores.mean(dim=1, keepdim=True) + grand
    between = columns * samples.squeeze(2).var(dim=1)
    rest = residual.square().sum(dim=(1, 2)) / ((group - 1) * (columns - 1))
    flat = (scores.amax(dim=1) == scores.amin(dim=1)).all(dim=1)
    return between.masked_fill(flat, 0.0), rest.masked_fill(flat, 0.0)


def _icc(between: Tensor, rest: Tensor, columns: int) -> Tensor:
    total = between + (columns - 1) * rest
    return torch.where(total > 0, (between - rest) / total, torch.zeros_like(total))
