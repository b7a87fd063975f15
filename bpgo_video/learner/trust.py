"""How much does a group count? A table of trusts: functions of what is known of a group, each giving w."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.forms import released_trust, reliability_adaptive_scaling
from bpgo_video.learner.reliability import reliability_trust
from bpgo_video.learner.settings import BPGOSettings


@dataclass(frozen=True)
class Evidence:
    """What a trust may look at: one reward's numbers. prior, scale and icc are None where the trust needs none."""

    rewards: Float[Tensor, "prompts group"]
    prior: Float[Tensor, "prompts"] | None
    scale: float | None
    icc: Float[Tensor, "prompts"] | None


def _sigmoid(seen: Evidence, settings: BPGOSettings) -> Tensor:
    assert seen.prior is not None  # bpgo.py refuses rewards without an anchor
    alpha, k = settings.alpha, settings.k
    return reliability_adaptive_scaling(seen.rewards, seen.prior, seen.scale, alpha, k, settings.centres)


def _posterior(seen: Evidence, settings: BPGOSettings) -> Tensor:
    assert seen.prior is not None
    alpha, prior_var = settings.alpha, settings.prior_var
    return released_trust(seen.rewards, seen.prior, seen.scale, alpha, prior_var, settings.centres)


def _reliability(seen: Evidence, settings: BPGOSettings) -> Tensor:
    assert seen.icc is not None  # and rewards that were scored once
    return reliability_trust(seen.icc, settings.alpha, settings.centres)


TRUSTS: dict[str, Callable[[Evidence, BPGOSettings], Tensor]] = {
    "sigmoid": _sigmoid,
    "posterior": _posterior,
    "reliability": _reliability,
}
