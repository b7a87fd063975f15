"""How far is the policy from a reference? The reference's velocity, and the divergence from it.

Under LoRA the starting policy is the same module with its adapters switched off. With all weights trained it is a
frozen copy, sharded like the policy under ZeRO-3. The average of the weights is the same module with other values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.diffusion.sde import Transition
from bpgo_video.distributed.ema import EMA
from bpgo_video.policies import Policy
from bpgo_video.rollouts.rollout import Denoiser
from bpgo_video.types import Guidance, Latents, Velocity


@runtime_checkable
class Reference(Protocol):
    """Another policy."""

    def velocity(self, denoiser: Denoiser, latents: Latents, index: int, guidance: Guidance) -> Velocity:
        """What the denoiser would find with that policy; no gradient. Asked before the policy's own forward, whose
        weights have to stay as they are until its backward."""
        ...


@dataclass(frozen=True)
class WithoutAdapters:
    """The trained transformers themselves, their adapters switched off for the forward."""

    module: Any

    @torch.no_grad()
    def velocity(self, denoiser: Denoiser, latents: Latents, index: int, guidance: Guidance) -> Velocity:
        adapted = [module for module in self.module.values() if getattr(module, "peft_config", None)]
        for module in adapted:
            module.disable_adapters()
        try:
            return denoiser.velocity(latents, index, guidance)
        finally:
            for module in adapted:
                module.enable_adapters()


@dataclass(frozen=True)
class FrozenCopy:
    """A policy of its own, with the starting weights."""

    policy: Policy

    @torch.no_grad()
    def velocity(self, denoiser: Denoiser, latents: Latents, index: int, guidance: Guidance) -> Velocity:
        return replace(denoiser, policy=self.policy).velocity(latents, index, guidance)


@dataclass(frozen=True)
class Averaged:
    """The trained module itself, computing with the average of its weights for the forward."""

    ema: EMA

    @torch.no_grad()
    def velocity(self, denoiser: Denoiser, latents: Latents, index: int, guidance: Guidance) -> Velocity:
        with self.ema.weights():
            return denoiser.velocity(latents, index, guidance)


def velocity_divergence(
    velocity: Velocity, reference: Velocity, transition_of: Callable[[Velocity], Transition]
) -> Float[Tensor, "samples"]:
    """|v - v_ref|^2, the mean over latent dimensions: the same pull at every noise level."""
    return (velocity - reference).square().flatten(1).mean(dim=1)


def mean_divergence(
    velocity: Velocity, reference: Velocity, transition_of: Callable[[Velocity], Transition]
) -> Float[Tensor, "samples"]:
    """|mean - mean_ref|^2 / (2 std^2): the KL of the transitions, the mean over latent dimensions (Flow-GRPO)."""
    own, other = transition_of(velocity), transition_of(reference)
    return ((own.mean - other.mean) / own.std).square().flatten(1).mean(dim=1) / 2


Divergence = Callable[[Velocity, Velocity, Callable[[Velocity], Transition]], Tensor]
DIVERGENCES: dict[str, Divergence] = {"velocity": velocity_divergence, "mean": mean_divergence}
