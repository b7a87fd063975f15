"""Metrics of a step's advantages: what trust and transformation did to the batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.advantages import equal_groups
from bpgo_video.learner.agreement import correlation
from bpgo_video.learner.equations import BPGOAdvantages
from bpgo_video.learner.trust import RewardsByName
from bpgo_video.types import PriorAnchor

TRUST_BINS = 10


def batch_metrics(
    trust: Float[Tensor, "prompts"],
    rewards_by_name: RewardsByName,
    of_rewards: Mapping[str, BPGOAdvantages],
    anchors: Mapping[str, PriorAnchor],
    alpha: float,
) -> dict[str, Tensor]:
    """What trust and transformation did to a batch, detached; names without a reward have the worst reward's value.

    Args:
        trust: mean over rewards.
        alpha: half the width of the trust's range; 0 if no reward has a trust.
    """
    metrics = {
        "trust_mean": trust.mean(),
        "trust_min": trust.min(),
        "trust_max": trust.max(),
        "trust_std": trust.std(correction=0),
    }
    if alpha:
        shares = trust_histogram(trust, alpha)
        metrics |= {f"trust/hist/{index:02d}": share for index, share in enumerate(shares.unbind())}
    equal = {name: equal_groups(rewards_by_name[name]).float().mean() for name in of_rewards}
    metrics |= _with_worst("zero_std_share", equal)
    if alpha and len(of_rewards) > 1:
        metrics |= {f"trust_mean/{name}": found.trust.mean() for name, found in of_rewards.items()}
        metrics |= {f"trust_std/{name}": found.trust.std(correction=0) for name, found in of_rewards.items()}
    names = list(of_rewards)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            between = correlation(of_rewards[one].advantage, of_rewards[other].advantage)
            metrics[f"agreement/{one}+{other}"] = between.mean()
    inversions = {
        name: rank_inversion(rewards_by_name[name], found.transformed)
        for name, found in of_rewards.items()
        if found.transformed is not None
    }
    if inversions:
        metrics |= _with_worst("crt/rank_inversion", inversions)
    metrics |= {f"prior/mean/{name}": anchor.mean.mean() for name, anchor in anchors.items()}
    spreads = {name: rewards_by_name[name].double().var(dim=1).mean().sqrt().float() for name in anchors}
    metrics |= {f"prior/group_std/{name}": spread for name, spread in spreads.items()}
    return metrics | {f"prior/scale/{name}": torch.tensor(anchor.scale) for name, anchor in anchors.items()}


def watched_metrics(
    train: Mapping[str, BPGOAdvantages], watched: Mapping[str, Float[Tensor, "prompts group"]]
) -> dict[str, Tensor]:
    """How each reward that trains agrees with each that is watched, and whether its trust knows where it does.

    `validity/A+B` is the mean correlation within groups, `trust_validity/A+B` Spearman's rank correlation, over the
    groups, of that correlation and the trust in A; absent where either is the same in all groups.

    Args:
        watched: group-relative advantages.
    """
    metrics = {}
    for name, found in train.items():
        for other, advantage in watched.items():
            validity = correlation(found.advantage, advantage)
            metrics[f"validity/{name}+{other}"] = validity.mean()
            if (knows := spearman(found.trust, validity)) is not None:
                metrics[f"trust_validity/{name}+{other}"] = knows
    return metrics


def spearman(one: Float[Tensor, "prompts"], other: Float[Tensor, "prompts"]) -> Float[Tensor, ""] | None:
    """Rank correlation, in which equal values have their mean rank; None if all values of either are equal."""
    if bool((one == one[0]).all()) or bool((other == other[0]).all()):
        return None
    ranks = ((values[:, None] > values).sum(dim=1) + (values[:, None] >= values).sum(dim=1) for values in (one, other))
    return correlation(*(twice.double()[None] for twice in ranks))[0]


def trust_by_kind(
    trust: Float[Tensor, "prompts"], tags: Sequence[Collection[str]], shown: Iterable[str]
) -> dict[str, Tensor]:
    """Mean trust of the prompts that have each of the `shown` tags; tags that no prompt has are absent."""
    rows = {tag: torch.tensor([tag in of_prompt for of_prompt in tags], dtype=torch.bool) for tag in shown if tags}
    return {f"trust_kind/{tag}": trust[rows[tag]].mean() for tag in rows if rows[tag].any()}


def _with_worst(name: str, by_reward: Mapping[str, Tensor]) -> dict[str, Tensor]:
    worst = torch.stack(list(by_reward.values())).max()
    return {name: worst, **{f"{name}/{reward}": value for reward, value in by_reward.items()}}


def trust_histogram(trust: Float[Tensor, "prompts"], alpha: float) -> Float[Tensor, "bins"]:
    """Share of the groups in each of TRUST_BINS equal bins of [1 - alpha, 1 + alpha]; w = 1 starts the upper half.

    Values at the upper end, or beyond either end by rounding, count in the nearest bin.
    """
    position = (trust.double() - 1 + alpha) / (2 * alpha) * TRUST_BINS
    index = (position + 1e-6).floor().long()  # an edge, such as w = 1, is in the bin above it, however it is rounded
    counts = torch.bincount(index.clamp(0, TRUST_BINS - 1), minlength=TRUST_BINS)
    return counts.float() / len(trust)


def rank_inversion(
    rewards: Float[Tensor, "prompts group"], transformed: Float[Tensor, "prompts group"]
) -> Float[Tensor, ""]:
    """Share of the within-group pairs of unequal reward whose order the transformation reverses, in [0, 1]."""
    before = torch.sign(rewards[:, :, None] - rewards[:, None, :])
    after = torch.sign(transformed[:, :, None] - transformed[:, None, :])
    ordered = (before != 0).sum()
    return (before * after < 0).sum().float() / ordered.clamp(min=1)
