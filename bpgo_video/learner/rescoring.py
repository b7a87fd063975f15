"""Which prompts are worth a second scoring? Those whose two scorings disagreed when they last met, and unknown ones.

Trust in reliability scores every video twice. Where a reward ranks a prompt's samples alike each time, the second
scoring tells nothing new: the prompt's last ICC stands in for it, until it is due again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpgo_video.learner.reliability import consistency


class Agreement(TypedDict):
    """What is known of a prompt.

    Attributes:
        icc: by reward, when it was last scored twice.
        passed: times that it has come up since.
    """

    icc: dict[str, float]
    passed: int


Agreements = dict[int, Agreement]  # by prompt id; plain numbers, which go into a checkpoint as they are


def due(known: Agreements, ids: Sequence[int], below: float, every: int) -> Bool[Tensor, "prompts"]:
    """Prompts to score twice: unknown ones, those with an ICC below `below` by any reward, and each `every`-th time."""
    return torch.tensor(
        [
            id_ not in known or min(known[id_]["icc"].values()) < below or known[id_]["passed"] + 1 >= every
            for id_ in ids
        ]
    )


def agreement(
    known: Agreements,
    ids: Sequence[int],
    first: Mapping[str, Float[Tensor, "prompts group"]],
    second: Mapping[str, Float[Tensor, "prompts group"]],
    twice: Bool[Tensor, "prompts"],
) -> dict[str, Float[Tensor, "prompts"]]:
    """ICC(3,1) of each prompt by reward: of this step's two scorings, or the last one known."""
    found = {}
    for name, scores in second.items():
        icc = torch.tensor([known[id_]["icc"][name] if id_ in known else 0.0 for id_ in ids], dtype=torch.float64)
        icc[twice] = consistency(torch.stack([first[name], scores], dim=2)[twice])
        found[name] = icc
    return found


def updated(
    known: Agreements,
    ids: Sequence[int],
    icc: Mapping[str, Float[Tensor, "prompts"]],
    twice: Bool[Tensor, "prompts"],
) -> Agreements:
    """What is known behind this step."""
    new: Agreements = {}
    for row, id_ in enumerate(ids):
        if twice[row]:
            new[id_] = Agreement(icc={name: float(values[row]) for name, values in icc.items()}, passed=0)
        else:
            new[id_] = Agreement(icc=known[id_]["icc"], passed=known[id_]["passed"] + 1)
    return {**known, **new}
