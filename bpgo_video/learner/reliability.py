"""Does a reward agree with itself? Test-retest reliability of scores, and the trust that follows from it.

Beyond the paper: its trust looks at a group's mean alone, so that noise which averages out within a group goes unseen.
Here each video is scored twice, by other frames or options of the same reward. Agreement is the intraclass correlation
ICC(3,1), "consistency" (Shrout and Fleiss, Psychological Bulletin 86, 1979), and not ICC(1,1): a scoring that is higher
for all samples by the same amount leaves group-relative advantages as they are, and ICC(1,1) would count it as noise.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def consistency(scores: Float[Tensor, "prompts group scorings"]) -> Float[Tensor, "prompts"]:
    """ICC(3,1) = (MS_samples - MS_rest) / (MS_samples + (scorings - 1) MS_rest) of each group, fp64, at most 1.

    MS_samples and MS_rest are the mean squares of a two-way analysis of variance. 1: the scorings differ by a constant;
    0 or below: they do not agree on what is better. A group whose samples all score the same gives 0. With two
    scorings it is 2 cov / (var + var). From a group of 8 its standard error is about .35 (1 - ICC^2).
    """
    between, rest = _mean_squares(scores)
    return _icc(between, rest, scores.shape[2])


def pooled_consistency(scores: Float[Tensor, "prompts group scorings"]) -> Float[Tensor, ""]:
    """ICC(3,1) of the mean squares averaged over prompts: how well one scoring ranks the samples of a group."""
    between, rest = _mean_squares(scores)
    return _icc(between.mean(), rest.mean(), scores.shape[2])


def reliability_trust(icc: Float[Tensor, "prompts"], alpha: float, centre: bool = False) -> Float[Tensor, "prompts"]:
    """w = 1 + 2 alpha (r - 1/2), r the ICC held in [0, 1]: from 1 - alpha for noise to 1 + alpha, as Eq 2's range.

    Args:
        centre: take r - mean_i r in place of r - 1/2, held in [-1/2, 1/2].
    """
    reliable = icc.double().clamp(0, 1)
    above = reliable - (reliable.mean() if centre else 0.5)
    return 1 + 2 * alpha * above.clamp(-0.5, 0.5)


def _mean_squares(
    scores: Float[Tensor, "prompts group scorings"],
) -> tuple[Float[Tensor, "prompts"], Float[Tensor, "prompts"]]:
    """Between samples, and of what sample and scoring do not explain; both 0 in a group without spread."""
    _, group, scorings = scores.shape
    if group < 2 or scorings < 2:
        raise ValueError(f"scores of {group} samples by {scorings} scorings: agreement needs 2 or more of each")
    scores = scores.double()
    samples, grand = scores.mean(dim=2, keepdim=True), scores.mean(dim=(1, 2), keepdim=True)
    rest = scores - samples - scores.mean(dim=1, keepdim=True) + grand
    between = scorings * samples.squeeze(2).var(dim=1)
    within = rest.square().sum(dim=(1, 2)) / ((group - 1) * (scorings - 1))
    flat = (scores.amax(dim=1) == scores.amin(dim=1)).all(dim=1)
    return between.masked_fill(flat, 0.0), within.masked_fill(flat, 0.0)


def _icc(between: Tensor, rest: Tensor, scorings: int) -> Tensor:
    total = between + (scorings - 1) * rest
    return torch.where(total > 0, (between - rest) / total, torch.zeros_like(total))
