"""The table of trusts: the weight w of each group of one reward.

Eq 2 and the authors' posterior compare a group's mean reward with an anchor. Beyond the paper: the level of a reward
tells nothing of its noise, which averages out in a group's mean. The other trusts follow from the
reliability rho of a video's score instead, the share of its variance within the group that is not noise. The posterior
mean of the score without noise, in units of the observed spread, is rho A; w = 1/2 + rho is a mild version of it, which
keeps more of the signal of noisy groups (docs/bpgo.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.learner import BPGOConfig
from bpgo_video.learner.agreement import frame_agreement
from bpgo_video.learner.equations import released_trust, reliability_adaptive_scaling
from bpgo_video.types import Table

RewardsByName = Mapping[str, Float[Tensor, "prompts group"]]
PerPrompt = Float[Tensor, "prompts"]


@dataclass(frozen=True)
class GroupScores:
    """What a trust may depend on: one reward's scores of a step's groups.

    Attributes:
        rewards: R, the scores that train; higher is better.
        prior: R_prior, in the reward's units; None without an anchor.
        scale: s_ref in u = (R - R_prior)/s_ref; None for the verbatim equations, or without an anchor.
        frames: scores of single frames; None for a reward that scores videos as a whole.
        reliability: rho of R by repeated scoring, in [0, 1]; None if no video is scored again.
        std: standard deviation of the error of each score in R, as the reward states it; None if it does not.
    """

    rewards: Float[Tensor, "prompts group"]
    prior: PerPrompt | None = None
    scale: float | None = None
    frames: Float[Tensor, "prompts group frames"] | None = None
    reliability: PerPrompt | None = None
    std: Float[Tensor, "prompts group"] | None = None


def agreement_trust(rho: PerPrompt, alpha: float, centre: bool = False) -> PerPrompt:
    """w = 1 + 2 alpha (rho - 1/2): from 1 - alpha to 1 + alpha, the range of Eq 2; 1/2 + rho at alpha = 1/2.

    Args:
        rho: reliability of a video's score, in [0, 1].
        centre: use rho - mean_i rho instead of rho - 1/2, clamped to [-1/2, 1/2].
    """
    rho = rho.double()
    return 1 + 2 * alpha * (rho - (rho.mean() if centre else 0.5)).clamp(-0.5, 0.5)


def sigmoid(scores: GroupScores, settings: BPGOConfig) -> PerPrompt:
    """RAS, Eq 2."""
    anchor = _anchor_of(scores)
    return reliability_adaptive_scaling(
        scores.rewards, anchor, scores.scale, settings.alpha, settings.k, settings.centres_trust
    )


def posterior(scores: GroupScores, settings: BPGOConfig) -> PerPrompt:
    """The trust of the authors' code."""
    anchor = _anchor_of(scores)
    return released_trust(
        scores.rewards, anchor, scores.scale, settings.alpha, settings.prior_var, settings.centres_trust
    )


def rho_of_frames(scores: GroupScores) -> PerPrompt:
    """The agreement of a video's frame scores."""
    if scores.frames is None or scores.frames.shape[2] < 2:
        raise ValueError(
            "trust 'frames' compares the scores of a video's frames, and this reward gives each video one score; set "
            "its `trust` to 'reliability' with `rescorings`, or to 'none'"
        )
    return frame_agreement(scores.frames)


def rho_of_scorings(scores: GroupScores) -> PerPrompt:
    """The agreement of several scorings."""
    if scores.reliability is None:
        raise ValueError(
            "trust 'reliability' compares several scorings of a video, and this reward scored each once; set "
            "`rescorings`, or its `trust` to 'frames' or 'none'"
        )
    if not bool(scores.reliability.isfinite().all()):
        raise ValueError(f"its reliability is {scores.reliability.tolist()}: it must be finite")
    return scores.reliability


def rho_of_stated_errors(scores: GroupScores) -> PerPrompt:
    """The errors that the reward itself states: rho = clip(1 - mean_j s_j^2 / var_j R, 0, 1), 0 in a flat group."""
    if scores.std is None:
        raise ValueError(
            "trust 'uncertainty' compares the spread of the scores with the std that the reward states, and this one "
            "states none (FrameScores.std), or not of all videos; set its `trust` to 'reliability' with `rescorings`, "
            "to 'frames' or to 'none'"
        )
    noise, spread = scores.std.double().square().mean(dim=1), scores.rewards.double().var(dim=1)
    return torch.where(spread > 0, 1 - noise / spread, 0.0).clamp(0, 1)


RELIABILITIES: dict[str, Callable[[GroupScores], PerPrompt]] = {  # trusts that follow from rho -> rho
    "frames": rho_of_frames,
    "reliability": rho_of_scorings,
    "uncertainty": rho_of_stated_errors,
}


def by_agreement(rho: Callable[[GroupScores], PerPrompt]) -> Callable[[GroupScores, BPGOConfig], PerPrompt]:
    """The trust that follows from a reliability."""

    def trust(scores: GroupScores, settings: BPGOConfig) -> PerPrompt:
        return agreement_trust(rho(scores), settings.alpha, settings.centres_trust)

    return trust


def none(scores: GroupScores, settings: BPGOConfig) -> PerPrompt:
    """w = 1."""
    return torch.ones_like(scores.rewards[:, 0])


TRUSTS: Table[Callable[[GroupScores, BPGOConfig], Tensor]] = Table(
    {
        "sigmoid": sigmoid,
        "posterior": posterior,
        **{name: by_agreement(rho) for name, rho in RELIABILITIES.items()},
        "none": none,
    }
)


def _anchor_of(scores: GroupScores) -> PerPrompt:
    if scores.prior is None:
        raise ValueError("this trust compares rewards with an anchor, and there is none")
    return scores.prior
