"""What is the loss of a policy on clips? The error of its velocity, at levels and under noise that keys decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.diffusion.flow_matching import Chances, Key, matching_error, noised, on_schedule, without_captions
from bpgo_video.policies import Policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.types import Conditioning, Latents


@dataclass(frozen=True)
class ClipBatch:
    """A micro-batch of clips, on the device where the policy computes.

    Attributes:
        ids: of the clips.
        conditioning: of their captions and, for image-to-video, their first frames; in the transformers' dtype.
    """

    ids: Sequence[int]
    latents: Latents
    conditioning: Conditioning


@dataclass(frozen=True)
class ClipLoss:
    """The flow-matching loss of one policy.

    Attributes:
        negative: what takes a caption's place where it is left out.
        schedule: the family's noise levels, from 1 down to 0.
        trained: names of the transformers that learn.
        seed: of all draws.
    """

    policy: Policy
    negative: Conditioning
    chances: Chances
    schedule: Float[Tensor, "points"]
    trained: tuple[str, ...]
    seed: int

    def transformer_of(self, step: int) -> str:
        """The transformer that a step trains, the same on every rank; of several, each as often as its levels come."""
        at = self.policy.transformer_at
        level = self.chances.level(
            (self.seed, "sft", "transformer", step), self.schedule, lambda sigma: at(sigma) in self.trained
        )
        return at(float(level))

    def errors(self, clips: ClipBatch, step: int, transformer: str) -> Float[Tensor, "samples"]:
        """The loss of each clip at a level of its own, with gradients; all levels are of one transformer."""
        keys: list[Key] = [(self.seed, "sft", step, key) for key in clips.ids]
        at = self.policy.transformer_at
        drawn = self.chances.draw(keys, clips.latents, self.schedule, lambda sigma: at(sigma) == transformer)
        # With frozen weights under adapters, a block's hooks (ZeRO-3, checkpointing) need an input with a gradient.
        latents = noised(clips.latents, drawn.noise, drawn.sigma).requires_grad_()
        conditioning = without_captions(clips.conditioning, self.negative, drawn.drops)
        velocity = self.policy.velocity(latents, drawn.sigma, conditioning)
        return matching_error(velocity, drawn.noise - clips.latents)

    @torch.no_grad()
    def errors_at(self, clips: ClipBatch, levels: Float[Tensor, "points"]) -> Float[Tensor, "samples points"]:
        """The loss of each clip at each of these levels, every caption in its place."""
        errors = []
        for number, sigma in enumerate(levels):
            keys = [(self.seed, "sft heldout", key, number) for key in clips.ids]
            noise = keyed_noise(clips.latents.shape[1:], keys, clips.latents.device)
            latents = noised(clips.latents, noise, sigma.expand(len(keys)))
            velocity = self.policy.velocity(latents, sigma, clips.conditioning)
            errors.append(matching_error(velocity, noise - clips.latents))
        return torch.stack(errors, dim=1)

    def levels(self, count: int) -> Float[Tensor, "points"]:
        """The middles of `count` equal shares of the family's schedule, low levels first."""
        return torch.stack([on_schedule((torch.tensor(i) + 0.5) / count, self.schedule) for i in range(count)])
