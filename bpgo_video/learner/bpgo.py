"""The advantages of a training step: A, A~ and w of several rewards, combined and bounded for the loss.

`one_reward.py` has BPGO itself, with its equations and departures. Here several rewards are anchored and transformed
one by one; then advantages are summed by weight and w is averaged by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bpgo_video.learner.advantages import (
    COMBINATIONS,
    NORMALISERS,
    AdvantageSettings,
    best_and_worst,
    clip_advantages,
    equal_groups,
    loss_scale,
)
from bpgo_video.learner.bpgo_metrics import anchor_metrics, reward_metrics, rms_quotient, trust_metrics
from bpgo_video.learner.equations import rank_inversion
from bpgo_video.learner.one_reward import TRANSFORMS, BPGOAdvantages, bpgo_advantages
from bpgo_video.learner.settings import BPGOSettings
from bpgo_video.learner.trust import TRUSTS
from bpgo_video.types import PriorAnchor

GRPO_ADVANTAGES = AdvantageSettings()


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
        contrastive: A~, group-relative advantage of the transformed rewards, without zeta; None when zeta is
            0. With ras_on_crt it holds w A~ (w > 0 commutes with the surrogate).
        trust: w.
        metrics: of this batch, detached; see bpgo_metrics.py.
        by_frame: what each latent frame adds to A, with mean 0 over them (credit.py); None credits videos as a whole.
    """

    advantage: Float[Tensor, "prompts group"]
    contrastive: Float[Tensor, "prompts group"] | None
    trust: Float[Tensor, "prompts"]
    metrics: Mapping[str, Tensor]
    by_frame: Float[Tensor, "prompts group latent_frames"] | None = None

    def total(self, zeta: float) -> Float[Tensor, "prompts group"]:
        """w A + zeta A~: what the loss's gradient is proportional to at ratio 1."""
        total = self.trust[:, None] * self.advantage
        return total if self.contrastive is None else total + zeta * self.contrastive

    def clipped(self, limit: float) -> GroupAdvantages:
        """Each surrogate's advantage held within [-limit, limit] AFTER the trust: |w A| and |A~| <= limit."""
        contrastive = None if self.contrastive is None else clip_advantages(self.contrastive, limit)
        advantage = clip_advantages(self.advantage, limit / self.trust[:, None])
        return replace(self, advantage=advantage, contrastive=contrastive)

    def times(self, factor: float | Float[Tensor, "..."]) -> GroupAdvantages:
        """Both surrogates' advantages times a factor: one number, or one a sample."""
        factor = torch.as_tensor(factor, dtype=self.advantage.dtype)
        contrastive = None if self.contrastive is None else factor * self.contrastive
        by_frame = None if self.by_frame is None else factor[..., None] * self.by_frame
        return replace(self, advantage=factor * self.advantage, contrastive=contrastive, by_frame=by_frame)

    @property
    def trains(self) -> Bool[Tensor, "prompts group"]:
        """Which samples have an advantage at all."""
        trains = self.advantage != 0
        if self.contrastive is not None:
            trains = trains | (self.contrastive != 0)
        return trains if self.by_frame is None else trains | (self.by_frame != 0).any(dim=2)

    def of(self, rows: Int[Tensor, "samples"], samples: Int[Tensor, "samples"]) -> LossAdvantages:
        """A, A~ and w of single samples, or of their latent frames where those are credited (frames innermost)."""
        advantage, trust = self.advantage[rows, samples], self.trust[rows]
        contrastive = None if self.contrastive is None else self.contrastive[rows, samples]
        if self.by_frame is None:
            return LossAdvantages(advantage, contrastive, trust)
        credited = advantage[:, None] + self.by_frame[rows, samples]

        def of_each_frame(values: Tensor) -> Tensor:
            return values[:, None].expand_as(credited).flatten()

        contrastive = None if contrastive is None else of_each_frame(contrastive)
        return LossAdvantages(credited.flatten(), contrastive, of_each_frame(trust))


def step_advantages(
    rewards_by_name: Mapping[str, Float[Tensor, "prompts group"]],
    anchors: Mapping[str, PriorAnchor],
    weights: Mapping[str, float],
    settings: BPGOSettings,
    advantage_settings: AdvantageSettings = GRPO_ADVANTAGES,
    icc: Mapping[str, Float[Tensor, "prompts"]] | None = None,
    by_frame: Float[Tensor, "prompts group latent_frames"] | None = None,
) -> GroupAdvantages:
    """A, A~ and w of one step's groups; with alpha = zeta = 0 exactly A of GRPO, None and 1.

    In this order: samples are left out (best_of), the step size is matched (match_rms), advantages are clipped, and
    the loss's mean is rescaled to the samples that count. "GRPO on the same batch" is the same with w = 1 and no A~.

    Args:
        anchors: by reward name; needed where settings.needs_prior says so.
        weights: by reward name, not negative.
        icc: how well two scorings of each group agree, by reward name; what trust "reliability" needs.
        by_frame: what each latent frame adds to A; it takes part in everything but the clip.

    Raises:
        ValueError: names the reward that is not finite, has no anchor or one of scale 0, no ICC, or a
            negative weight.
        OverflowError: names the reward whose transformation overflows.
    """
    _check_rewards(rewards_by_name, weights)
    if settings.needs_prior:
        _check_anchors(rewards_by_name, anchors)
    icc = icc or {}
    if settings.trusts and settings.own_trust == "reliability":
        _check_agreement(rewards_by_name, icc)
    found, inversions = _surrogates(rewards_by_name, anchors, weights, settings, advantage_settings, icc)
    found = replace(found, by_frame=by_frame)
    if advantage_settings.best_of is not None:
        found = found.times(best_and_worst(found.advantage, advantage_settings.best_of).to(found.advantage.dtype))
    grpo = found.advantage
    if settings.match_rms:
        found = found.times(rms_quotient(grpo, found.total(settings.zeta)))
    found = found.clipped(advantage_settings.clip)
    step_size = rms_quotient(found.total(settings.zeta), clip_advantages(grpo, advantage_settings.clip))
    metrics = {
        **trust_metrics(found.trust, settings.alpha if settings.trusts else 0.0),
        "rms_ratio": step_size,
        **reward_metrics(rewards_by_name, inversions),
        **anchor_metrics(anchors),
    }
    flat = torch.stack([equal_groups(rewards) for name, rewards in rewards_by_name.items() if weights[name]]).all(dim=0)
    return replace(found.times(loss_scale(advantage_settings, flat, grpo.shape[1])), metrics=metrics)


def _surrogates(
    rewards_by_name: Mapping[str, Float[Tensor, "prompts group"]],
    anchors: Mapping[str, PriorAnchor],
    weights: Mapping[str, float],
    settings: BPGOSettings,
    advantage_settings: AdvantageSettings,
    icc: Mapping[str, Float[Tensor, "prompts"]],
) -> tuple[GroupAdvantages, dict[str, Tensor]]:
    """A, A~ and w before anything bounds them, and the rank inversions of A~ by reward."""
    by_name = {
        name: _of_reward(name, rewards, anchors.get(name), settings, advantage_settings, icc.get(name))
        for name, rewards in rewards_by_name.items()
    }
    combine = COMBINATIONS[advantage_settings.combine]
    advantage = combine({name: found.advantage for name, found in by_name.items()}, weights)
    trust = advantage.new_ones(advantage.shape[0])
    if settings.trusts:
        weighed = torch.stack([weights[name] * found.trust for name, found in by_name.items()]).sum(dim=0)
        trust = (weighed / sum(weights.values())).to(advantage.dtype)
    transformed = {name: found.transformed for name, found in by_name.items() if found.transformed is not None}
    inversions = {name: rank_inversion(rewards_by_name[name], values) for name, values in transformed.items()}
    second = {name: found.contrastive for name, found in by_name.items() if found.contrastive is not None}
    contrastive = combine(second, weights).to(advantage.dtype) if second else None
    if contrastive is not None and settings.ras_on_crt:
        contrastive = trust[:, None] * contrastive
    return GroupAdvantages(advantage, contrastive, trust, {}), inversions


def _of_reward(
    name: str,
    rewards: Float[Tensor, "prompts group"],
    anchor: PriorAnchor | None,
    settings: BPGOSettings,
    advantage_settings: AdvantageSettings,
    icc: Float[Tensor, "prompts"] | None,
) -> BPGOAdvantages:
    """`bpgo_advantages` in the form and with the trust of the settings."""
    alpha = settings.alpha if settings.trusts else 0.0
    prior, scale = (None, None) if anchor is None else _prior_and_scale(anchor, rewards, settings)
    try:
        return bpgo_advantages(
            *(rewards, prior, scale, alpha, settings.k, settings.contrast, settings.zeta),
            trust=TRUSTS[settings.own_trust](settings, icc),
            transform=TRANSFORMS[settings.form],
            normalise=NORMALISERS[advantage_settings.normalise],
        )
    except OverflowError as error:
        raise OverflowError(f"reward {name!r}: {error}") from error


def _prior_and_scale(
    anchor: PriorAnchor, rewards: Float[Tensor, "prompts group"], settings: BPGOSettings
) -> tuple[Float[Tensor, "prompts"], float | None]:
    return anchor.mean.to(rewards.device), anchor.scale if settings.standardise else None


def _check_rewards(rewards_by_name: Mapping[str, Float[Tensor, "prompts group"]], weights: Mapping[str, float]) -> None:
    for name, rewards in rewards_by_name.items():
        bad = (~rewards.isfinite()).nonzero()
        if len(bad):
            prompt, sample = bad[0].tolist()
            value = rewards[prompt, sample].item()
            raise ValueError(f"reward {name!r} is {value} at prompt row {prompt}, sample {sample}: it must be finite")
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"reward {name!r} has weight {weight}: orient rewards upwards and weigh them by 0 or more")
    if not sum(weights.values()) > 0:
        raise ValueError(f"weights {dict(weights)}: at least one must be above 0")


def _check_anchors(
    rewards_by_name: Mapping[str, Float[Tensor, "prompts group"]], anchors: Mapping[str, PriorAnchor]
) -> None:
    for name in rewards_by_name:
        if name not in anchors:
            raise ValueError(
                f"reward {name!r} has no prior anchor, which BPGO compares it with: run "
                "bpgo-video priors, or set alpha and zeta to 0 for plain GRPO"
            )
        if not bool(anchors[name].mean.isfinite().all()):
            raise ValueError(f"reward {name!r} has an anchor that is not finite: {anchors[name].mean.tolist()}")
        if not 0 < anchors[name].scale < math.inf:
            raise ValueError(
                f"reward {name!r} has an anchor of scale {anchors[name].scale}: the reference samples of every "
                "prompt scored alike; check the reward, then run bpgo-video priors again"
            )


def _check_agreement(rewards_by_name: Mapping[str, Tensor], icc: Mapping[str, Tensor]) -> None:
    for name in rewards_by_name:
        if name not in icc:
            raise ValueError(f"reward {name!r} was scored once: trust 'reliability' compares two scorings of it")
        if not bool(icc[name].isfinite().all()):
            raise ValueError(f"reward {name!r} has an ICC that is not finite")
