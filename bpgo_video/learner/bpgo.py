"""The advantages of a training step: A, A~ and w of several rewards, combined and bounded for the loss, and metrics.

`equations.py` has BPGO on one reward. Here each reward has its own anchor, trust and transformation; then advantages
are summed by weight, and w is their weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bpgo_video.config.learner import AdvantageConfig, BPGOConfig
from bpgo_video.learner.advantages import (
    COMBINATIONS,
    NORMALISERS,
    best_and_worst,
    clip_advantages,
    equal_groups,
    loss_scale,
)
from bpgo_video.learner.equations import TRANSFORMS, BPGOAdvantages, bpgo_advantages
from bpgo_video.learner.trust import TRUSTS, RewardsByName
from bpgo_video.types import PriorAnchor

GRPO = AdvantageConfig()
TRUST_BINS = 10


@dataclass(frozen=True)
class LossAdvantages:
    """A, A~ and w of each row of a loss: a sample, or a latent frame of one."""

    advantage: Float[Tensor, "rows"]
    contrastive: Float[Tensor, "rows"] | None
    trust: Float[Tensor, "rows"]

    def to(self, device: torch.device) -> LossAdvantages:
        contrastive = None if self.contrastive is None else self.contrastive.to(device)
        return LossAdvantages(self.advantage.to(device), contrastive, self.trust.to(device))


@dataclass(frozen=True)
class GroupAdvantages:
    """What the loss needs of a step's rewards: w surr(ratio, advantage) + zeta surr(ratio, contrastive).

    Attributes:
        advantage: A, group-relative, without w.
        contrastive: A~, group-relative advantage of the transformed rewards, without zeta; None at zeta = 0. With
            ras_on_crt it is w A~ (w > 0 commutes with the surrogate).
        trust: w.
        metrics: of this batch, detached; see `batch_metrics`.
        by_frame: added to A for each latent frame, with mean 0 over frames; None credits videos as a whole.
    """

    advantage: Float[Tensor, "prompts group"]
    contrastive: Float[Tensor, "prompts group"] | None
    trust: Float[Tensor, "prompts"]
    metrics: Mapping[str, Tensor]
    by_frame: Float[Tensor, "prompts group latent_frames"] | None = None

    def total(self, zeta: float) -> Float[Tensor, "prompts group"]:
        """w A + zeta A~: the loss's gradient at ratio 1 is proportional to it."""
        total = self.trust[:, None] * self.advantage
        return total if self.contrastive is None else total + zeta * self.contrastive

    def clipped(self, limit: float) -> GroupAdvantages:
        """Each surrogate's advantage clamped to [-limit, limit] AFTER the trust: |w A| and |A~| <= limit."""
        contrastive = None if self.contrastive is None else clip_advantages(self.contrastive, limit)
        advantage = clip_advantages(self.advantage, limit / self.trust[:, None])
        return replace(self, advantage=advantage, contrastive=contrastive)

    def times(self, factor: float | Float[Tensor, "..."]) -> GroupAdvantages:
        """Both surrogates' advantages times a factor: one number, or one per sample."""
        factor = torch.as_tensor(factor, dtype=self.advantage.dtype)
        contrastive = None if self.contrastive is None else factor * self.contrastive
        by_frame = None if self.by_frame is None else factor[..., None] * self.by_frame
        return replace(self, advantage=factor * self.advantage, contrastive=contrastive, by_frame=by_frame)

    @property
    def trains(self) -> Bool[Tensor, "prompts group"]:
        """Which samples have an advantage that is not 0."""
        trains = self.advantage != 0
        if self.contrastive is not None:
            trains = trains | (self.contrastive != 0)
        return trains if self.by_frame is None else trains | (self.by_frame != 0).any(dim=2)

    def of(self, rows: Int[Tensor, "samples"], samples: Int[Tensor, "samples"]) -> LossAdvantages:
        """A, A~ and w of single samples, or with by_frame of their latent frames (frames innermost)."""
        advantage, trust = self.advantage[rows, samples], self.trust[rows]
        contrastive = None if self.contrastive is None else self.contrastive[rows, samples]
        if self.by_frame is None:
            return LossAdvantages(advantage, contrastive, trust)
        credited = advantage[:, None] + self.by_frame[rows, samples]

        def per_frame(values: Tensor) -> Tensor:
            return values[:, None].expand_as(credited).flatten()

        contrastive = None if contrastive is None else per_frame(contrastive)
        return LossAdvantages(credited.flatten(), contrastive, per_frame(trust))


def step_advantages(
    rewards_by_name: RewardsByName,
    anchors: Mapping[str, PriorAnchor],
    weights: Mapping[str, float],
    bpgo: BPGOConfig,
    normalisation: AdvantageConfig = GRPO,
    clip: float = math.inf,
    icc: Mapping[str, Float[Tensor, "prompts"]] | None = None,
    by_frame: Float[Tensor, "prompts group latent_frames"] | None = None,
) -> GroupAdvantages:
    """A, A~ and w of one step's groups; with alpha = zeta = 0 exactly A of GRPO, None and 1.

    The order is: samples are left out (best_of), the step size is matched (match_rms), advantages are clipped, and the
    loss's mean is rescaled to the samples that count. "GRPO on the same batch" is the same with w = 1 and no A~.

    Args:
        anchors: by reward name; needed if bpgo.needs_prior.
        weights: by reward name, 0 or more, and one above 0.
        clip: bound on the magnitude of an advantage, after the trust.
        icc: of two scorings of each group, by reward name; needed if bpgo.scores_twice.
        by_frame: added to A for each latent frame; everything but the clip applies to it.

    Raises:
        ValueError: names the reward that is not finite, has no anchor or one of scale 0, or no ICC.
        OverflowError: names the reward whose transformation overflows.
    """
    icc = icc or {}
    _check(rewards_by_name, anchors, bpgo, icc)
    of_rewards = {
        name: _of_reward(name, rewards, anchors.get(name), bpgo, normalisation, icc.get(name))
        for name, rewards in rewards_by_name.items()
    }
    found = replace(_combined(of_rewards, weights, bpgo, normalisation.combine), by_frame=by_frame)
    if normalisation.best_of is not None:
        found = found.times(best_and_worst(found.advantage, normalisation.best_of).to(found.advantage.dtype))
    grpo = found.advantage
    if bpgo.match_rms:
        found = found.times(rms_quotient(grpo, found.total(bpgo.zeta)))
    found = found.clipped(clip)
    rms_ratio = rms_quotient(found.total(bpgo.zeta), clip_advantages(grpo, clip))
    metrics = batch_metrics(found.trust, rms_ratio, rewards_by_name, of_rewards, anchors, bpgo)
    equal = torch.stack([equal_groups(rewards) for name, rewards in rewards_by_name.items() if weights[name]])
    return replace(found.times(loss_scale(normalisation, equal.all(dim=0), grpo.shape[1])), metrics=metrics)


def _of_reward(
    name: str,
    rewards: Float[Tensor, "prompts group"],
    anchor: PriorAnchor | None,
    bpgo: BPGOConfig,
    normalisation: AdvantageConfig,
    icc: Float[Tensor, "prompts"] | None,
) -> BPGOAdvantages:
    """`bpgo_advantages` in the form and with the trust of the settings; errors name the reward."""

    def trust(rewards: Tensor, prior: Tensor | None, scale: float | None, alpha: float, k: float) -> Tensor:
        return TRUSTS[bpgo.trust_kind](rewards, prior, scale, bpgo, icc)

    alpha = bpgo.alpha if bpgo.uses_trust else 0.0
    prior = None if anchor is None else anchor.mean.to(rewards.device)
    scale = None if anchor is None or not bpgo.standardise else anchor.scale
    try:
        return bpgo_advantages(
            *(rewards, prior, scale, alpha, bpgo.k, bpgo.contrast, bpgo.zeta),
            trust=trust,
            transform=TRANSFORMS[bpgo.form],
            normalise=NORMALISERS[normalisation.normalise],
        )
    except (ValueError, OverflowError) as error:
        raise type(error)(f"reward {name!r}: {error}") from error


def _combined(
    of_rewards: Mapping[str, BPGOAdvantages], weights: Mapping[str, float], bpgo: BPGOConfig, combine: str
) -> GroupAdvantages:
    """A, A~ and w over all rewards, before anything bounds them."""
    combination = COMBINATIONS[combine]
    advantage = combination({name: found.advantage for name, found in of_rewards.items()}, weights)
    trust = advantage.new_ones(advantage.shape[0])
    if bpgo.uses_trust:
        weighted = torch.stack([weights[name] * found.trust for name, found in of_rewards.items()]).sum(dim=0)
        trust = (weighted / sum(weights.values())).to(advantage.dtype)
    second = {name: found.contrastive for name, found in of_rewards.items() if found.contrastive is not None}
    contrastive = combination(second, weights).to(advantage.dtype) if second else None
    if contrastive is not None and bpgo.ras_on_crt:
        contrastive = trust[:, None] * contrastive
    return GroupAdvantages(advantage, contrastive, trust, {})


def _check(
    rewards_by_name: RewardsByName,
    anchors: Mapping[str, PriorAnchor],
    bpgo: BPGOConfig,
    icc: Mapping[str, Tensor],
) -> None:
    for name, rewards in rewards_by_name.items():
        bad = (~rewards.isfinite()).nonzero()
        if len(bad):
            prompt, sample = bad[0].tolist()
            value = rewards[prompt, sample].item()
            raise ValueError(f"reward {name!r} is {value} at prompt row {prompt}, sample {sample}: it must be finite")
        if bpgo.needs_prior and name not in anchors:
            raise ValueError(
                f"reward {name!r} has no prior anchor, which BPGO compares it with: run bpgo-video priors, or set "
                "alpha and zeta to 0 for plain GRPO"
            )
        if bpgo.scores_twice and name not in icc:
            raise ValueError(f"reward {name!r} was scored once: trust 'reliability' compares two scorings of it")
        if bpgo.scores_twice and not bool(icc[name].isfinite().all()):
            raise ValueError(f"reward {name!r} has an ICC that is not finite")


def rms_quotient(one: Float[Tensor, "prompts group"], other: Float[Tensor, "prompts group"]) -> Float[Tensor, ""]:
    """RMS(one)/RMS(other), and 1 if either is 0, which is when no group has signal."""
    above, below = (tensor.square().mean().sqrt() for tensor in (one, other))
    return torch.where((above > 0) & (below > 0), above / below, torch.ones_like(below))


def batch_metrics(
    trust: Float[Tensor, "prompts"],
    rms_ratio: Float[Tensor, ""],
    rewards_by_name: RewardsByName,
    of_rewards: Mapping[str, BPGOAdvantages],
    anchors: Mapping[str, PriorAnchor],
    bpgo: BPGOConfig,
) -> dict[str, Tensor]:
    """What trust and transformation did to a batch, detached; names without a reward have the worst reward's value.

    Args:
        rms_ratio: RMS of w A + zeta A~ over that of GRPO's A, both after the clip: the step size at ratio 1. It shows
            when a trust that rises for all groups acts as a larger learning rate.
    """
    metrics = {
        "trust_mean": trust.mean(),
        "trust_min": trust.min(),
        "trust_max": trust.max(),
        "trust_std": trust.std(correction=0),
    }
    if bpgo.uses_trust:
        shares = trust_histogram(trust, bpgo.alpha)
        metrics |= {f"trust/hist/{index:02d}": share for index, share in enumerate(shares.unbind())}
    equal = {name: equal_groups(rewards).float().mean() for name, rewards in rewards_by_name.items()}
    metrics |= {"rms_ratio": rms_ratio, **_with_worst("zero_std_share", equal)}
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
