"""What has each prompt earned of late? Moving averages of a run's own rewards, behind the priors that follow it.

Plain dictionaries of numbers: they go into a checkpoint as they are. Every rank computes them of the same gathered
rewards in float64, so that they are the same on every rank, and a resumed run has them to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor


class RunningReward(TypedDict):
    """Moving averages of one reward.

    Attributes:
        mean: of the groups' mean rewards, over all prompts.
        spread: of the pooled within-group standard deviation, s_ref; None until a group's rewards differed.
        prompts: prompt id -> average of that prompt's group means.
    """

    mean: float
    spread: float | None
    prompts: dict[int, float]


RunningRewards = dict[str, RunningReward]


def started(rewards: Float[Tensor, "prompts group"], scale: float | None) -> RunningReward:
    """The averages that a run's first batch is seen with: its own mean and spread, and no prompt.

    Args:
        scale: a first s_ref in place of the batch's.
    """
    return RunningReward(mean=float(rewards.double().mean()), spread=scale or pooled_spread(rewards), prompts={})


def pooled_spread(rewards: Float[Tensor, "prompts group"]) -> float | None:
    """sqrt(mean_i s_i^2), s_i the standard deviation of group i (ddof 1); None where no group's rewards differ."""
    if bool((rewards.amax(dim=1) == rewards.amin(dim=1)).all()):
        return None
    return float(rewards.double().var(dim=1).mean().sqrt())


def averaged(
    running: RunningReward, ids: Sequence[int], rewards: Float[Tensor, "prompts group"], decay: float
) -> RunningReward:
    """m <- decay m + (1 - decay) new, for the mean, the spread, and each prompt of the batch.

    A prompt that was not seen before starts at its group's mean; a batch without any spread leaves s_ref as it is.
    """
    means, new_spread = rewards.double().mean(dim=1), pooled_spread(rewards)
    old = running["prompts"]
    moved = {id_: _moved(old.get(id_), mean, decay) for id_, mean in zip(ids, means.tolist(), strict=True)}
    return RunningReward(
        mean=_moved(running["mean"], float(means.mean()), decay),
        spread=running["spread"] if new_spread is None else _moved(running["spread"], new_spread, decay),
        prompts={**old, **moved},
    )


def updated(
    running: Mapping[str, RunningReward],
    ids: Sequence[int],
    rewards_by_name: Mapping[str, Float[Tensor, "prompts group"]],
    decay: float,
    scale: float | None,
) -> RunningRewards:
    """The averages with one more batch in them, by reward name; `scale` is the first s_ref, None for the batch's."""
    return {
        name: averaged(running.get(name) or started(rewards, scale), ids, rewards, decay)
        for name, rewards in rewards_by_name.items()
    }


def _moved(old: float | None, new: float, decay: float) -> float:
    return new if old is None else decay * old + (1 - decay) * new


def per_prompt(running: RunningReward, ids: Sequence[int]) -> Float[Tensor, "prompts"]:
    """Each prompt's average, and the one over all prompts for those that were not seen yet."""
    return torch.tensor([running["prompts"].get(id_, running["mean"]) for id_ in ids], dtype=torch.float64)
