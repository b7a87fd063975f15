"""How much better than its group is each sample? Group-relative advantages, and several rewards in one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

DELTA = 1e-6  # added to a group's std, as in GRPO


def group_relative(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """A = (R - mean_j R) / (std_j R + 1e-6), std with ddof 1 (GRPO, arXiv 2402.03300).

    In fp32, or fp64 if the rewards are. A group whose largest reward equals its smallest gives exactly 0:
    there the plain formula divides rounding noise by 1e-6.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"group of {rewards.shape[1]}: an advantage compares samples of one prompt; use 2 or more")
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    advantage = (rewards - mean) / (std + DELTA)
    return advantage.masked_fill(equal_groups(rewards)[:, None], 0.0)


def combine(
    advantages_by_name: Mapping[str, Float[Tensor, "prompts group"]], weights: Mapping[str, float]
) -> Float[Tensor, "prompts group"]:
    """sum_r weights[r] A_r over the rewards r. Names must agree."""
    if not advantages_by_name or set(advantages_by_name) != set(weights):
        raise ValueError(
            f"advantages of {sorted(advantages_by_name)} but weights of {sorted(weights)}: give each reward one weight"
        )
    return torch.stack([weights[name] * advantage for name, advantage in advantages_by_name.items()]).sum(dim=0)


def clip_advantages(
    advantage: Float[Tensor, "prompts group"], limit: float | Float[Tensor, "prompts #group"]
) -> Float[Tensor, "prompts group"]:
    """Advantages held within [-limit, limit]; a tensor gives each prompt its own limit."""
    bound = torch.as_tensor(limit, dtype=advantage.dtype, device=advantage.device)
    if not bool((bound > 0).all()):
        raise ValueError(f"limit={limit}: advantages are clipped to [-limit, limit] with limit > 0")
    return torch.clamp(advantage, -bound, bound)


def zero_std_share(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, ""]:
    """Share of the groups that teach nothing, because all their rewards are equal."""
    return equal_groups(rewards).float().mean()


def equal_groups(rewards: Float[Tensor, "prompts group"]) -> Bool[Tensor, "prompts"]:
    """True where a group's largest reward equals its smallest."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)
