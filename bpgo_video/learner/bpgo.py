"""The advantages of a training step: A and A~ of several rewards, weighted by trust, combined and bounded, and metrics.

`equations.py` has BPGO on one reward. Here each reward has its own anchor, trust w and transformation; then advantages
are summed over rewards by weight, A_i = sum_r weight_r w_ir A_ir. A factor above 0 on its advantage multiplies the
clipped surrogate, so that the loss on w A is w times the loss on A, as in Eq 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bpgo_video.config.learner import AdvantageConfig, BPGOConfig
from bpgo_video.learner.advantages import (
    COMBINATIONS,
    NORMALISERS,
    averaged_below,
    best_and_worst,
    clip_advantages,
    equal_groups,
    loss_scale,
)
from bpgo_video.learner.equations import TRANSFORMS, BPGOAdvantages, bpgo_advantages, released_advantages
from bpgo_video.learner.metrics import batch_metrics, watched_metrics
from bpgo_video.learner.preferences import Posterior, posterior_of
from bpgo_video.learner.trust import RELIABILITIES, TRUSTS, GroupScores, RewardsByName
from bpgo_video.types import PriorAnchor

GRPO = AdvantageConfig()
WATCHED = BPGOConfig(alpha=0, zeta=0)  # of a reward of weight 0: A alone, for the metrics
MATCHES = 100  # rounds of the search for the factor of match_rms; without a clip one is enough
FrameScores = Float[Tensor, "prompts group frames"]


@dataclass(frozen=True)
class LossAdvantages:
    """A, weighted by trust, and A~ of each row of a loss: a sample, or a latent frame of one."""

    advantage: Float[Tensor, "rows"]
    contrastive: Float[Tensor, "rows"] | None = None

    def to(self, device: torch.device) -> LossAdvantages:
        contrastive = None if self.contrastive is None else self.contrastive.to(device)
        return LossAdvantages(self.advantage.to(device), contrastive)


@dataclass(frozen=True)
class GroupAdvantages:
    """What the loss needs of a step's rewards: surr(ratio, advantage) + zeta surr(ratio, contrastive).

    Attributes:
        advantage: sum_r weight_r w_r A_r, A_r group-relative.
        contrastive: sum_r weight_r A~_r, of the transformed rewards, without zeta; None at zeta = 0. With ras_on_crt
            it has the factors w_r too.
        trust: mean of w_r over rewards, by weight; for logs.
        metrics: of this batch, detached; see `batch_metrics`.
        by_frame: added to the advantage for each latent frame, with mean 0 over frames and the same trust; None
            credits videos as a whole.
        posterior: of the samples' scores without noise, for objectives that learn from pairs.
    """

    advantage: Float[Tensor, "prompts group"]
    contrastive: Float[Tensor, "prompts group"] | None
    trust: Float[Tensor, "prompts"]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    by_frame: Float[Tensor, "prompts group latent_frames"] | None = None
    posterior: Posterior | None = None

    def total(self, zeta: float) -> Float[Tensor, "prompts group frames"]:
        """w A + zeta A~ of each video or latent frame: the loss's gradient at ratio 1 is proportional to it."""
        total = self.advantage if self.contrastive is None else self.advantage + zeta * self.contrastive
        return total[..., None] if self.by_frame is None else total[..., None] + self.by_frame

    def clipped(self, limit: float) -> GroupAdvantages:
        """Each surrogate's advantage clamped to [-limit, limit] AFTER the trust: |w A| and |A~| <= limit."""
        contrastive = None if self.contrastive is None else clip_advantages(self.contrastive, limit)
        return replace(self, advantage=clip_advantages(self.advantage, limit), contrastive=contrastive)

    def times(self, factor: float | Float[Tensor, "..."]) -> GroupAdvantages:
        """Both surrogates' advantages times a factor: one number, or one per sample."""
        factor = torch.as_tensor(factor, dtype=self.advantage.dtype)
        contrastive = None if self.contrastive is None else factor * self.contrastive
        by_frame = None if self.by_frame is None else factor[..., None] * self.by_frame
        return replace(self, advantage=factor * self.advantage, contrastive=contrastive, by_frame=by_frame)

    def averaged_below(self, below: int, rescaled: bool) -> GroupAdvantages:
        """Both surrogates' advantages of the edges of a tree, for each of the `below` samples that share one."""
        contrastive = None if self.contrastive is None else averaged_below(self.contrastive, below, rescaled)
        return replace(self, advantage=averaged_below(self.advantage, below, rescaled), contrastive=contrastive)

    @property
    def trains(self) -> Bool[Tensor, "prompts group"]:
        """Which samples have an advantage that is not 0."""
        trains = self.advantage != 0
        if self.contrastive is not None:
            trains = trains | (self.contrastive != 0)
        return trains if self.by_frame is None else trains | (self.by_frame != 0).any(dim=2)

    def of(self, rows: Int[Tensor, "samples"], samples: Int[Tensor, "samples"]) -> LossAdvantages:
        """The advantages of single samples, or with by_frame of their latent frames (frames innermost)."""
        advantage = self.advantage[rows, samples]
        contrastive = None if self.contrastive is None else self.contrastive[rows, samples]
        if self.by_frame is None:
            return LossAdvantages(advantage, contrastive)
        credited = advantage[:, None] + self.by_frame[rows, samples]
        if contrastive is not None:
            contrastive = contrastive[:, None].expand_as(credited).flatten()
        return LossAdvantages(credited.flatten(), contrastive)


def step_advantages(
    rewards_by_name: RewardsByName,
    anchors: Mapping[str, PriorAnchor],
    weights: Mapping[str, float],
    bpgo: BPGOConfig,
    normalisation: AdvantageConfig = GRPO,
    clip: float = math.inf,
    *,
    trusts: Mapping[str, Any] | None = None,
    frames: Mapping[str, FrameScores] | None = None,
    reliability: Mapping[str, Float[Tensor, "prompts"]] | None = None,
    stds: RewardsByName | None = None,
    credit: Mapping[str, Float[Tensor, "prompts group latent_frames"]] | None = None,
) -> GroupAdvantages:
    """The advantages of one step's groups; with alpha = zeta = 0 exactly A of GRPO, None and 1.

    The order is: trust, combination of rewards, samples are left out (best_of), the step size is matched (match_rms),
    advantages are clipped, and the loss's mean is rescaled to the samples that count. "GRPO on the same batch" is the
    same with w = 1 and no A~.

    Args:
        anchors: by reward name; needed where a reward's settings compare it with an anchor.
        weights: by reward name, one above 0. A reward of weight 0 is in the metrics alone, and needs nothing else.
        clip: bound on the magnitude of an advantage, after the trust.
        trusts: of rewards that have a trust of their own instead of bpgo.trust.
        frames: scores of single frames, by reward name; needed for trust `frames`.
        reliability: rho in [0, 1] of each group's scores, by reward name; needed for trust `reliability`.
        stds: standard deviation of the error of each score, by reward name; needed for trust `uncertainty`.
        credit: what a reward adds to A for each latent frame, by reward name; None credits videos as a whole.

    Raises:
        ValueError: names the reward that is not finite, has no anchor or one of scale 0, or lacks what its trust needs.
        OverflowError: names the reward whose transformation overflows.
    """
    frames, reliability, stds = frames or {}, reliability or {}, stds or {}
    own = {
        name: replace(bpgo, trust=(trusts or {}).get(name, bpgo.trust)) if weights[name] else WATCHED
        for name in rewards_by_name
    }
    of_rewards, known = {}, {}
    for name, rewards in rewards_by_name.items():
        _check(name, rewards, anchors, own[name])
        given = (frames.get(name), reliability.get(name), stds.get(name))
        scores = GroupScores(rewards, *_anchored(anchors.get(name), rewards.device, bpgo.standardise), *given)
        of_rewards[name] = _of_reward(name, scores, own[name], NORMALISERS[normalisation.normalise])
        if own[name].uses_trust and own[name].trust_kind in RELIABILITIES:
            known[name] = RELIABILITIES[own[name].trust_kind](scores)
    train = {name: found for name, found in of_rewards.items() if weights[name]}
    watched = {name: found.advantage for name, found in of_rewards.items() if not weights[name]}
    posterior = posterior_of({name: found.advantage for name, found in train.items()}, weights, known)
    found, grpo = _combined(train, weights, bpgo.ras_on_crt, normalisation.combine, credit)
    if normalisation.best_of is not None:
        counts = best_and_worst(found.advantage, normalisation.best_of).to(found.advantage.dtype)
        found, grpo = found.times(counts), grpo.times(counts)
    unmatched, target = found.total(bpgo.zeta), grpo.clipped(clip).total(0)
    if bpgo.match_rms:
        found = found.times(_matching_factor(found, bpgo.zeta, clip, target))
    found = found.clipped(clip)
    rms_ratio = rms_quotient(found.total(bpgo.zeta), target)
    alpha = bpgo.alpha if any(settings.uses_trust for settings in own.values()) else 0.0
    metrics = batch_metrics(found.trust, rewards_by_name, train, anchors, alpha) | watched_metrics(train, watched)
    metrics |= {"rms_ratio": rms_ratio, **_distrusted(found.trust, unmatched, grpo.total(0), bpgo)}
    equal = torch.stack([equal_groups(rewards_by_name[name]) for name in train])
    found = found.times(loss_scale(normalisation, equal.all(dim=0), found.advantage.shape[1]))
    return replace(found, metrics=metrics, posterior=posterior)


def _anchored(
    anchor: PriorAnchor | None, device: torch.device, standardise: bool
) -> tuple[Float[Tensor, "prompts"] | None, float | None]:
    """R_prior, and s_ref unless the equations are taken verbatim."""
    return (None, None) if anchor is None else (anchor.mean.to(device), anchor.scale if standardise else None)


def _of_reward(
    name: str, scores: GroupScores, bpgo: BPGOConfig, normalise: Callable[[Tensor], Tensor]
) -> BPGOAdvantages:
    """BPGO on one reward in the form and with the trust of the settings; errors name the reward."""

    def trust(exact: Tensor, *_: object) -> Tensor:
        return TRUSTS[bpgo.trust_kind](replace(scores, rewards=exact), bpgo)

    alpha = bpgo.alpha if bpgo.uses_trust else 0.0
    try:
        if bpgo.form == "released_exact":
            assert scores.prior is not None
            return released_advantages(scores.rewards, scores.prior, alpha, bpgo.contrast, bpgo.prior_var, normalise)
        return bpgo_advantages(
            *(scores.rewards, scores.prior, scores.scale, alpha, bpgo.k, bpgo.contrast, bpgo.zeta),
            trust=trust,
            transform=TRANSFORMS[bpgo.form],
            normalise=normalise,
        )
    except (ValueError, OverflowError) as error:
        raise type(error)(f"reward {name!r}: {error}") from error


def _combined(
    of_rewards: Mapping[str, BPGOAdvantages],
    weights: Mapping[str, float],
    ras_on_crt: bool,
    combine: str,
    credit: Mapping[str, Tensor] | None,
) -> tuple[GroupAdvantages, GroupAdvantages]:
    """The advantages over all rewards, and those of GRPO (w = 1, no A~), before anything bounds them."""
    combination, weights = COMBINATIONS[combine], {name: weights[name] for name in of_rewards}
    plain = {name: found.advantage for name, found in of_rewards.items()}
    trust = {name: found.trust.to(plain[name].dtype) for name, found in of_rewards.items()}
    total = sum(weights.values())
    mean = torch.stack([weights[name] * w for name, w in trust.items()]).sum(dim=0) / total
    second = {name: found.contrastive for name, found in of_rewards.items() if found.contrastive is not None}
    if ras_on_crt:
        second = {name: trust[name][:, None] * contrastive for name, contrastive in second.items()}
    trusted = {name: trust[name][:, None] * advantage for name, advantage in plain.items()}
    advantage = combination(trusted, weights)
    contrastive = combination(second, weights).to(advantage.dtype) if second else None
    by_frame = grpo_by_frame = None
    if credit is not None:
        terms = {name: weight * credit[name] for name, weight in weights.items()}
        grpo_by_frame = torch.stack(list(terms.values())).sum(dim=0)
        by_frame = torch.stack([trust[name][:, None, None] * term for name, term in terms.items()]).sum(dim=0)
    found = GroupAdvantages(advantage, contrastive, mean, by_frame=by_frame)
    return found, GroupAdvantages(combination(plain, weights), None, torch.ones_like(mean), by_frame=grpo_by_frame)


def _check(name: str, rewards: Tensor, anchors: Mapping[str, PriorAnchor], bpgo: BPGOConfig) -> None:
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


def _matching_factor(found: GroupAdvantages, zeta: float, clip: float, target: Tensor) -> Float[Tensor, ""]:
    """The factor on both advantages with which the RMS of their total, after the clip, is that of the target.

    Each round multiplies it by the quotient that is left. That converges, because the clip makes the RMS grow by less
    than the factor.
    """
    factor = torch.ones_like(target[0, 0, 0])
    for _ in range(MATCHES):
        quotient = rms_quotient(target, found.times(factor).clipped(clip).total(zeta))
        factor = factor * quotient
        if abs(float(quotient) - 1) < torch.finfo(factor.dtype).eps:
            break
    return factor


def _distrusted(trust: Tensor, total: Tensor, grpo: Tensor, bpgo: BPGOConfig) -> dict[str, Tensor]:
    """RMS(w A + zeta A~) / RMS(A) over the groups with w < 1: the second surrogate may restore what w took."""
    rows = trust < 1
    if not bpgo.zeta or bpgo.ras_on_crt or not bool(rows.any()):
        return {}
    return {"crt/distrusted_rms": rms_quotient(total[rows], grpo[rows])}


def rms_quotient(one: Float[Tensor, "..."], other: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """RMS(one)/RMS(other), and 1 if either is 0, which is when no group has signal."""
    above, below = (tensor.square().mean().sqrt() for tensor in (one, other))
    return torch.where((above > 0) & (below > 0), above / below, torch.ones_like(below))
