"""The table of trusts w, the intraclass correlation of two scorings, and which prompts are scored twice.

Beyond the paper: Eq 2 depends on a group's mean alone, so it does not detect reward noise, which averages out in a
group. With trust `reliability` each video is scored twice, with other frames or options of the same reward, and w
follows from the ICC of the two scorings. Where a prompt's ICC is high, its second scoring can be skipped for a while:
the last ICC is used until the prompt is due again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpgo_video.config.learner import BPGOConfig
from bpgo_video.learner.equations import released_trust, reliability_adaptive_scaling
from bpgo_video.types import Table

RewardsByName = Mapping[str, Float[Tensor, "prompts group"]]


def icc_trust(icc: Float[Tensor, "prompts"], alpha: float, centre: bool = False) -> Float[Tensor, "prompts"]:
    """w = 1 + 2 alpha (r - 1/2), r the ICC clamped to [0, 1]: from 1 - alpha to 1 + alpha, the range of Eq 2.

    Args:
        centre: use r - mean_i r instead of r - 1/2, clamped to [-1/2, 1/2].
    """
    r = icc.double().clamp(0, 1)
    return 1 + 2 * alpha * (r - (r.mean() if centre else 0.5)).clamp(-0.5, 0.5)


# name -> (R, R_prior, s_ref, settings, ICC) -> w
TRUSTS: Table[Callable[[Tensor, Any, float | None, BPGOConfig, Any], Tensor]] = Table(
    {
        "sigmoid": lambda r, prior, scale, c, icc: reliability_adaptive_scaling(
            r, prior, scale, c.alpha, c.k, c.centres_trust
        ),
        "posterior": lambda r, prior, scale, c, icc: released_trust(
            r, prior, scale, c.alpha, c.prior_var, c.centres_trust
        ),
        "reliability": lambda r, prior, scale, c, icc: icc_trust(icc, c.alpha, c.centres_trust),
        "none": lambda r, prior, scale, c, icc: torch.ones_like(r[:, 0]),
    }
)


def group_icc(scores: Float[Tensor, "prompts group scorings"]) -> Float[Tensor, "prompts"]:
    """ICC(3,1) = (MS_samples - MS_rest) / (MS_samples + (scorings - 1) MS_rest) of each group, fp64, at most 1.

    MS_samples and MS_rest are the mean squares of a two-way analysis of variance (Shrout and Fleiss, Psychological
    Bulletin 86, 1979). 1: the scorings differ by a constant; 0 or below: they disagree on which samples are better. A
    group whose samples all score the same gives 0. With two scorings it is 2 cov / (var + var). For a group of 8 its
    standard error is about .35 (1 - ICC^2). It is not ICC(1,1), which counts a constant offset between the scorings as
    noise: group-relative advantages do not depend on that offset.
    """
    return _icc(*_mean_squares(scores), scores.shape[2])


def pooled_icc(scores: Float[Tensor, "prompts group scorings"]) -> Float[Tensor, ""]:
    """ICC(3,1) of the mean squares averaged over prompts: how well one scoring ranks the samples of a group."""
    between, rest = _mean_squares(scores)
    return _icc(between.mean(), rest.mean(), scores.shape[2])


def _mean_squares(
    scores: Float[Tensor, "prompts group scorings"],
) -> tuple[Float[Tensor, "prompts"], Float[Tensor, "prompts"]]:
    """MS_samples and MS_rest; both 0 in a group without spread."""
    _, group, scorings = scores.shape
    if group < 2 or scorings < 2:
        raise ValueError(f"scores of {group} samples by {scorings} scorings: an ICC needs 2 or more of each")
    scores = scores.double()
    samples, grand = scores.mean(dim=2, keepdim=True), scores.mean(dim=(1, 2), keepdim=True)
    residual = scores - samples - scores.mean(dim=1, keepdim=True) + grand
    between = scorings * samples.squeeze(2).var(dim=1)
    rest = residual.square().sum(dim=(1, 2)) / ((group - 1) * (scorings - 1))
    flat = (scores.amax(dim=1) == scores.amin(dim=1)).all(dim=1)
    return between.masked_fill(flat, 0.0), rest.masked_fill(flat, 0.0)


def _icc(between: Tensor, rest: Tensor, scorings: int) -> Tensor:
    total = between + (scorings - 1) * rest
    return torch.where(total > 0, (between - rest) / total, torch.zeros_like(total))


class LastICC(TypedDict):
    """The last ICC of a prompt.

    Attributes:
        icc: by reward.
        passed: how often the prompt has been sampled since.
    """

    icc: dict[str, float]
    passed: int


ICCHistory = dict[int, LastICC]  # by prompt id; plain numbers, which checkpoints store


def needs_second_scoring(history: ICCHistory, ids: Sequence[int], below: float, every: int) -> Bool[Tensor, "prompts"]:
    """New prompts, those whose last ICC by any reward is below `below`, and others every `every`-th time."""
    return torch.tensor(
        [
            id_ not in history or min(history[id_]["icc"].values()) < below or history[id_]["passed"] + 1 >= every
            for id_ in ids
        ]
    )


def icc_by_reward(
    history: ICCHistory, ids: Sequence[int], first: RewardsByName, second: RewardsByName, twice: Bool[Tensor, "prompts"]
) -> dict[str, Float[Tensor, "prompts"]]:
    """Each prompt's ICC(3,1) by reward: of this step's scorings where it is scored `twice`, else the last one."""
    found = {}
    for name, scores in second.items():
        icc = torch.tensor([history[id_]["icc"][name] if id_ in history else 0.0 for id_ in ids], dtype=torch.float64)
        if twice.any():  # torch warns of the variance of nothing
            icc[twice] = group_icc(torch.stack([first[name], scores], dim=2)[twice])
        found[name] = icc
    return found


def updated_history(
    history: ICCHistory, ids: Sequence[int], icc: Mapping[str, Float[Tensor, "prompts"]], twice: Bool[Tensor, "prompts"]
) -> ICCHistory:
    """The history after a step whose prompts have these ICCs."""
    new: ICCHistory = {}
    for row, id_ in enumerate(ids):
        if twice[row]:
            new[id_] = LastICC(icc={name: float(values[row]) for name, values in icc.items()}, passed=0)
        else:
            new[id_] = LastICC(icc=history[id_]["icc"], passed=history[id_]["passed"] + 1)
    return {**history, **new}
