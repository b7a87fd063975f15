"""Group-relative advantages: how much better than its group each sample is, and several rewards in one.

Everything is a function of the gathered rewards of one step, prompts x group, so that all ranks find the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

DELTA = 1e-6  # added to a standard deviation, as in GRPO


@dataclass(frozen=True)
class AdvantageSettings:
    """How rewards become advantages; the defaults are GRPO's.

    Attributes:
        normalise: of NORMALISERS, what a sample's distance from its group's mean is divided by.
        combine: of COMBINATIONS, how the advantages of several rewards become one.
        drop_zero_std: let the loss be the mean over groups with signal, not over all.
        best_of: train on the n best and the n worst samples of each group; None on all.
        clip: advantages are held within [-clip, clip], after the trust and before the loss's mean is rescaled.
    """

    normalise: str = "group"
    combine: str = "weighted_sum"
    drop_zero_std: bool = False
    best_of: int | None = None
    clip: float = math.inf

    def __post_init__(self) -> None:
        rules = {
            "normalise": (self.normalise in NORMALISERS, f"must be one of {', '.join(NORMALISERS)}"),
            "combine": (self.combine in COMBINATIONS, f"must be one of {', '.join(COMBINATIONS)}"),
            "best_of": (self.best_of is None or self.best_of >= 1, "must be at least 1, or None for all samples"),
            "clip": (self.clip > 0, "advantages are clipped to [-clip, clip], clip > 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: {rule}")


def group_relative(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """A = (R - mean_j R) / (std_j R + 1e-6), std with ddof 1 (GRPO, arXiv 2402.03300).

    In fp32, or fp64 if the rewards are. A group whose largest reward equals its smallest gives exactly 0:
    there the plain formula divides rounding noise by 1e-6.
    """
    rewards = _comparable(rewards)
    return _over(rewards, rewards.std(dim=1, keepdim=True))


def batch_relative(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """A = (R - mean_j R) / (std R + 1e-6), std over all samples of the step (ddof 1).

    Groups keep their relative spreads (Flow-GRPO's global std, arXiv 2505.05470).
    """
    rewards = _comparable(rewards)
    return _over(rewards, rewards.std())


def max_std_relative(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """A = (R - mean_j R) / (max_i std_j R_i + 1e-6): the group that differs most has std 1, the others less."""
    rewards = _comparable(rewards)
    return _over(rewards, rewards.std(dim=1).max())


def mean_subtracted(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """A = R - mean_j R, in the reward's own units (Dr. GRPO, arXiv 2503.20783)."""
    rewards = _comparable(rewards)
    return _over(rewards, torch.ones((), dtype=rewards.dtype, device=rewards.device), delta=0.0)


def win_rate_relative(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """`group_relative` of the within-group win rates (Pref-GRPO, arXiv 2508.20751): the order alone counts."""
    return group_relative(win_rates(rewards))


def win_rates(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """Share of the rest of its group that each sample beats, in [0, 1]; a tie is half a win."""
    rewards = _comparable(rewards)
    won_less_lost = torch.sign(rewards[:, :, None] - rewards[:, None, :]).sum(dim=2)
    return 0.5 + won_less_lost / (2 * (rewards.shape[1] - 1))


def _comparable(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    if rewards.shape[1] < 2:
        raise ValueError(f"group of {rewards.shape[1]}: an advantage compares samples of one prompt; use 2 or more")
    return rewards if rewards.dtype == torch.float64 else rewards.float()


def _over(rewards: Float[Tensor, "prompts group"], spread: Tensor, delta: float = DELTA) -> Tensor:
    advantage = (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + delta)
    return advantage.masked_fill(equal_groups(rewards)[:, None], 0.0)


NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "group": group_relative,
    "global": batch_relative,
    "max_std": max_std_relative,
    "none": mean_subtracted,
    "win_rate": win_rate_relative,
}


def weighted_sum(
    advantages_by_name: Mapping[str, Float[Tensor, "prompts group"]], weights: Mapping[str, float]
) -> Float[Tensor, "prompts group"]:
    """sum_r weights[r] A_r over the rewards r. Names must agree."""
    if not advantages_by_name or set(advantages_by_name) != set(weights):
        raise ValueError(
            f"advantages of {sorted(advantages_by_name)} but weights of {sorted(weights)}: give each reward one weight"
        )
    return torch.stack([weights[name] * advantage for name, advantage in advantages_by_name.items()]).sum(dim=0)


def batch_standardised_sum(
    advantages_by_name: Mapping[str, Float[Tensor, "prompts group"]], weights: Mapping[str, float]
) -> Float[Tensor, "prompts group"]:
    """S / (std S + 1e-6), S the weighted sum and std over the batch (ddof 1): GDPO's last step (arXiv 2601.05242).

    The batch mean of S is not subtracted: each A_r has mean 0 in each group, and so has S; what is left is rounding,
    which must not give samples of a group without signal an advantage. Only the weights' proportions matter.
    """
    total = weighted_sum(advantages_by_name, weights)
    return total / (total.std() + DELTA)


COMBINATIONS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, float]], Tensor]] = {
    "weighted_sum": weighted_sum,
    "gdpo": batch_standardised_sum,
}


def clip_advantages(
    advantage: Float[Tensor, "prompts group"], limit: float | Float[Tensor, "prompts #group"]
) -> Float[Tensor, "prompts group"]:
    """Advantages held within [-limit, limit]; a tensor gives each prompt its own limit."""
    bound = torch.as_tensor(limit, dtype=advantage.dtype, device=advantage.device)
    if not bool((bound > 0).all()):
        raise ValueError(f"limit={limit}: advantages are clipped to [-limit, limit] with limit > 0")
    return torch.clamp(advantage, -bound, bound)


def best_and_worst(advantage: Float[Tensor, "prompts group"], n: int) -> Bool[Tensor, "prompts group"]:
    """True for the n best and the n worst samples of each group (DanceGRPO, arXiv 2505.07818).

    Among equal advantages the place in the group decides.

    Raises:
        ValueError: a group has fewer than 2 n samples.
    """
    group = advantage.shape[1]
    if not 1 <= n <= group // 2:
        raise ValueError(f"best_of={n} of a group of {group}: the n best and the n worst need 1 <= n <= {group // 2}")
    rank = advantage.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return (rank < n) | (rank >= group - n)


def loss_scale(settings: AdvantageSettings, flat: Bool[Tensor, "prompts"], group: int) -> float:
    """What makes the loss's mean over all samples a mean over those that count.

    group / (2 best_of) where samples are left out, prompts / (groups with signal) where flat groups do not count; 1
    where no group has signal. A function of the whole step: it is exact however groups are spread over ranks.

    Args:
        flat: groups in which all rewards are equal.
    """
    scale = 1.0
    if settings.best_of is not None:
        scale *= group / (2 * settings.best_of)
    informative = int((~flat).sum())
    if settings.drop_zero_std and informative:
        scale *= len(flat) / informative
    return scale


def zero_std_share(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, ""]:
    """Share of the groups that teach nothing, because all their rewards are equal."""
    return equal_groups(rewards).float().mean()


def equal_groups(rewards: Float[Tensor, "prompts group"]) -> Bool[Tensor, "prompts"]:
    """True where a group's largest reward equals its smallest."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)
