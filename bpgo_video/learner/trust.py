"""A table of trusts: how much does a group count? Each entry gives the function that computes w."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.equations import released_trust, reliability_adaptive_scaling
from bpgo_video.learner.reliability import reliability_trust
from bpgo_video.learner.settings import BPGOSettings

Trust = Callable[..., Tensor]  # (rewards, prior, scale, alpha, k) -> w; a trust may ignore some of them
Agreement = Float[Tensor, "prompts"] | None  # the ICC of each prompt's two scorings, where there are two


def sigmoid(settings: BPGOSettings, icc: Agreement) -> Trust:
    """Eq 2: the group's mean against the anchor."""

    def trust(rewards: Tensor, prior: Tensor, scale: float | None, alpha: float, k: float) -> Tensor:
        return reliability_adaptive_scaling(rewards, prior, scale, alpha, k, settings.centres)

    return trust


def posterior(settings: BPGOSettings, icc: Agreement) -> Trust:
    """The probability that the group's mean lies above the anchor, as in the authors' code; k has no effect."""

    def trust(rewards: Tensor, prior: Tensor, scale: float | None, alpha: float, k: float) -> Tensor:
        return released_trust(rewards, prior, scale, alpha, settings.prior_var, settings.centres)

    return trust


def reliability(settings: BPGOSettings, icc: Agreement) -> Trust:
    """How well two scorings of the group agree; alpha alone of the arguments has an effect."""

    def trust(rewards: Tensor, prior: Tensor | None, scale: float | None, alpha: float, k: float) -> Tensor:
        if icc is None:
            raise ValueError("trust 'reliability' compares two scorings of each group, but there is no ICC")
        return reliability_trust(icc, alpha, settings.centres)

    return trust


def none(settings: BPGOSettings, icc: Agreement) -> Trust:
    """w = 1."""
    return lambda rewards, prior, scale, alpha, k: torch.ones_like(rewards[:, 0])


TRUSTS: dict[str, Callable[[BPGOSettings, Agreement], Trust]] = {
    "sigmoid": sigmoid,
    "posterior": posterior,
    "reliability": reliability,
    "none": none,
}
