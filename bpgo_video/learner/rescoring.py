"""Which prompts are scored again, and the reliability of their scores.

The ICC of one group of 8 has a standard error of up to .35. A prompt that was scored before therefore keeps a share of
its last ICC, which so becomes a moving average. Where the scorings of a prompt agreed well, further scorings can be
skipped for a while: its one score then counts with the last ICC, until the prompt is due again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpgo_video.learner.agreement import group_icc, spearman_brown

Scorings = Mapping[str, Float[Tensor, "prompts group scorings"]]  # by reward; nan where a prompt is scored once
PerPrompt = Float[Tensor, "prompts"]


class LastICC(TypedDict):
    """The last ICC of a prompt.

    Attributes:
        icc: of one scoring, by reward; averaged over its groups.
        passed: how often the prompt has been sampled since.
    """

    icc: dict[str, float]
    passed: int


ICCHistory = dict[int, LastICC]  # by prompt id; plain numbers, which checkpoints store


def needs_rescoring(history: ICCHistory, ids: Sequence[int], below: float, every: int) -> Bool[Tensor, "prompts"]:
    """New prompts, those whose last ICC by any reward is below `below`, and others every `every`-th time."""
    return torch.tensor(
        [
            id_ not in history or min(history[id_]["icc"].values()) < below or history[id_]["passed"] + 1 >= every
            for id_ in ids
        ]
    )


def icc_by_reward(
    history: ICCHistory, ids: Sequence[int], scorings: Scorings, again: Bool[Tensor, "prompts"], memory: float
) -> dict[str, PerPrompt]:
    """Each prompt's ICC(3,1) by reward: with this step's scorings where it is scored `again`, else the last one.

    Args:
        memory: share of the last ICC of a prompt that is scored again, in [0, 1).
    """
    found = {}
    kept = torch.tensor([memory if id_ in history else 0.0 for id_ in ids], dtype=torch.float64)[again]
    for name, scores in scorings.items():
        icc = torch.tensor([history[id_]["icc"][name] if id_ in history else 0.0 for id_ in ids], dtype=torch.float64)
        if again.any():  # torch warns of the variance of nothing
            icc[again] = kept * icc[again] + (1 - kept) * group_icc(scores[again])
        found[name] = icc
    return found


def reliability_of(icc: PerPrompt, scorings: int, again: Bool[Tensor, "prompts"]) -> PerPrompt:
    """rho of each prompt's training score: of the mean of its scorings where it is scored `again`, else of one score.

    Args:
        icc: of one scoring.
        scorings: of a prompt that is scored again.
    """
    return spearman_brown(icc, torch.where(again, scorings, 1))


def updated_history(
    history: ICCHistory, ids: Sequence[int], icc: Mapping[str, PerPrompt], again: Bool[Tensor, "prompts"]
) -> ICCHistory:
    """The history after a step whose prompts have these ICCs."""
    new: ICCHistory = {}
    for row, id_ in enumerate(ids):
        if again[row]:
            new[id_] = LastICC(icc={name: float(values[row]) for name, values in icc.items()}, passed=0)
        else:
            new[id_] = LastICC(icc=history[id_]["icc"], passed=history[id_]["passed"] + 1)
    return {**history, **new}
