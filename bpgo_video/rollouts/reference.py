"""Reference policies and the divergence of the trained policy from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.diffusion.flow_matching import matching_error
from bpgo_video.diffusion.sde import Transition
from bpgo_video.policies import Policy
from bpgo_video.rollouts.rollout import Denoiser
from bpgo_video.types import Guidance, Latents, Velocity


@dataclass(frozen=True)
class Reference:
    """A policy that the loss keeps the trained one close to.

    Attributes:
        policy: a frozen copy, or the trained policy itself.
        weights: the block in which the policy computes with the reference's weights, such as `EMA.weights`.
    """

    policy: Policy
    weights: Callable[[], AbstractContextManager[None]] = nullcontext

    @torch.no_grad()
    def velocity(self, denoiser: Denoiser, latents: Latents, index: int, guidance: Guidance) -> Velocity:
        """The reference's velocity at denoising step `index`.

        Call it before the policy's own forward, whose weights must not change until its backward.
        """
        with self.weights():
            return replace(denoiser, policy=self.policy).velocity(latents, index, guidance)


@contextmanager
def adapters_off(transformers: Any) -> Iterator[None]:
    """LoRA adapters are disabled inside the block: the transformers compute as before training."""
    adapted = [module for module in transformers.values() if getattr(module, "peft_config", None)]
    for module in adapted:
        module.disable_adapters()
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters()


Divergence = Callable[[Velocity, Velocity, Callable[[Velocity], Transition]], Tensor]


def velocity_divergence(
    velocity: Velocity, reference: Velocity, transition_of: Callable[[Velocity], Transition]
) -> Float[Tensor, "samples"]:
    """|v - v_ref|^2, the mean over latent dimensions; equally strong at every noise level."""
    return matching_error(velocity, reference)


def mean_divergence(
    velocity: Velocity, reference: Velocity, transition_of: Callable[[Velocity], Transition]
) -> Float[Tensor, "samples"]:
    """|mean - mean_ref|^2 / (2 std^2), the transitions' KL, the mean over latent dimensions (Flow-GRPO)."""
    current, other = transition_of(velocity), transition_of(reference)
    return ((current.mean - other.mean) / current.std).square().flatten(1).mean(dim=1) / 2


DIVERGENCES: dict[str, Divergence] = {"velocity": velocity_divergence, "mean": mean_divergence}
