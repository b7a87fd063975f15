"""Losses on the forward process: supervised flow matching on clips, AWM and NFT on a rollout's final videos.

All three noise clean latents, x = (1 - sigma) x0 + sigma eps, and compare the velocity with the target eps - x0. AWM
and NFT need no log-prob of the rollout, so any solver may sample; they learn at the noise levels of the trained steps.

- awm, advantage weighted matching (arXiv 2509.25050): -|v - target|^2, the mean over latent dimensions, replaces the
  log-prob in GRPO's surrogate, ratio and clip included.
- nft, DiffusionNFT (arXiv 2509.16117): with v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v, the loss
  is r |v+ - target|^2 + (1 - r) |v- - target|^2. The optimality r maps the advantage from [-limit, limit] to [0, 1].

Both take BPGO's advantages: l(w A) + zeta l(A~), on one forward. "Old" is the policy that sampled: velocities recorded
before the first update of a rollout, or with a single update the detached velocity itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bpgo_video.config.bpgo import LossConfig
from bpgo_video.diffusion import flow_matching
from bpgo_video.diffusion.flow_matching import matching_error
from bpgo_video.learner.bpgo import LossAdvantages
from bpgo_video.learner.losses import PolicyShift, bpgo_loss, ratio_metrics
from bpgo_video.policies import Policy
from bpgo_video.randomness import generator_of, keyed_noise
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.rules import trained_steps_of
from bpgo_video.rollouts.updates import Objective
from bpgo_video.types import Conditioning, Latents, Loss, Trajectory, Velocity


@dataclass(frozen=True)
class ClipBatch:
    """A micro-batch of clips on the policy's device.

    Attributes:
        ids: one per clip.
        conditioning: of the captions and, for image-to-video, the first frames, in the transformers' dtype.
    """

    ids: Sequence[int]
    latents: Latents
    conditioning: Conditioning


@dataclass(frozen=True)
class ClipLoss:
    """The supervised flow-matching loss of a policy on clips.

    Attributes:
        negative: conditioning that replaces a dropped caption.
        levels: distribution of the noise levels.
        caption_dropout: share of clips whose caption is dropped, so that the policy learns to be guided.
        schedule: the family's noise levels, from 1 to 0.
        trained: names of the trained transformers.
        seed: of all draws.
    """

    policy: Policy
    negative: Conditioning
    levels: flow_matching.LevelDistribution
    caption_dropout: float
    schedule: Float[Tensor, "points"]
    trained: tuple[str, ...]
    seed: int

    def transformer_of(self, step: int) -> str:
        """The transformer that a step trains, the same on every rank; each as often as its noise levels are drawn."""
        at = self.policy.transformer_at
        key = (self.seed, "sft", "transformer", step)
        return at(float(self.levels.draw(key, self.schedule, lambda sigma: at(sigma) in self.trained)))

    def draw(
        self, clips: ClipBatch, step: int, transformer: str
    ) -> tuple[Float[Tensor, "samples"], Latents, Bool[Tensor, "samples"]]:
        """Noise level (on the CPU), noise, and whether the caption is dropped, of each clip.

        Args:
            transformer: computes at all drawn levels.
        """
        keys: list[flow_matching.Key] = [(self.seed, "sft", step, clip) for clip in clips.ids]
        at, device = self.policy.transformer_at, clips.latents.device
        levels = [self.levels.draw(key, self.schedule, lambda sigma: at(sigma) == transformer) for key in keys]
        noise = keyed_noise(clips.latents.shape[1:], [(*key, "noise") for key in keys], device)
        shares = [float(torch.rand((), generator=generator_of(*key, "caption"))) for key in keys]
        drops = torch.tensor([share < self.caption_dropout for share in shares], device=device)
        return torch.stack(levels), noise, drops

    def errors(self, clips: ClipBatch, step: int, transformer: str) -> Float[Tensor, "samples"]:
        """The loss of each clip at its own noise level, with gradients."""
        sigma, noise, drops = self.draw(clips, step, transformer)
        # With frozen weights under adapters, a block's hooks (ZeRO-3, checkpointing) need an input with a gradient.
        latents = flow_matching.noised(clips.latents, noise, sigma).requires_grad_()
        conditioning = flow_matching.without_captions(clips.conditioning, self.negative, drops)
        velocity = self.policy.velocity(latents, sigma, conditioning)
        return matching_error(velocity, noise - clips.latents)

    @torch.no_grad()
    def errors_at(self, clips: ClipBatch, levels: Float[Tensor, "points"]) -> Float[Tensor, "samples points"]:
        """The held-out loss of each clip at each of these noise levels; no caption is dropped."""
        errors = []
        for number, sigma in enumerate(levels):
            keys = [(self.seed, "sft heldout", clip, number) for clip in clips.ids]
            noise = keyed_noise(clips.latents.shape[1:], keys, clips.latents.device)
            latents = flow_matching.noised(clips.latents, noise, sigma.expand(len(keys)))
            velocity = self.policy.velocity(latents, sigma, clips.conditioning)
            errors.append(matching_error(velocity, noise - clips.latents))
        return torch.stack(errors, dim=1)

    def heldout_levels(self, count: int) -> Float[Tensor, "points"]:
        """The midpoints of `count` equal parts of the family's schedule, low noise levels first."""
        positions = [(torch.tensor(i) + 0.5) / count for i in range(count)]
        return torch.stack([flow_matching.on_schedule(position, self.schedule) for position in positions])


@dataclass(frozen=True)
class VelocityMatch:
    """The policy's velocity with gradients, the sampling policy's velocity, and their target noise - data."""

    velocity: Velocity
    old: Velocity
    target: Velocity

    @property
    def shift(self) -> PolicyShift:
        """The policy shift with minus the matching error as log-prob."""
        return PolicyShift(matching_error(self.old, self.target) - matching_error(self.velocity, self.target))


def nft_error(
    match: VelocityMatch, advantage: Float[Tensor, "samples"], settings: LossConfig
) -> Float[Tensor, "samples"]:
    """r |v+ - target|^2 + (1 - r) |v- - target|^2,   r = 1/2 + clamp(A/limit, -1, 1)/2,   limit = advantage_clip"""
    beta, optimality = settings.nft_beta, 0.5 + 0.5 * (advantage / settings.advantage_clip).clamp(-1, 1)
    better = matching_error((1 - beta) * match.old + beta * match.velocity, match.target)
    worse = matching_error((1 + beta) * match.old - beta * match.velocity, match.target)
    return optimality * better + (1 - optimality) * worse


def awm_loss(match: VelocityMatch, advantages: LossAdvantages, zeta: float, settings: LossConfig) -> Loss:
    """The clipped surrogate with minus the matching error as log-prob."""
    return bpgo_loss(match.shift, advantages.advantage, advantages.contrastive, zeta, settings)


def nft_loss(match: VelocityMatch, advantages: LossAdvantages, zeta: float, settings: LossConfig) -> Loss:
    """nft(w A) + zeta nft(A~); the metrics are those of AWM's ratio, which NFT does not clip."""
    loss = nft_error(match, advantages.advantage, settings)
    if zeta != 0 and advantages.contrastive is not None:
        loss = loss + zeta * nft_error(match, advantages.contrastive, settings)
    return Loss(loss.mean(), ratio_metrics(match.shift, advantages.advantage, settings))


MATCHING_LOSSES: dict[str, Callable[[VelocityMatch, LossAdvantages, float, LossConfig], Loss]] = {
    "awm": awm_loss,
    "nft": nft_loss,
}


@dataclass(frozen=True)
class ForwardProcess(Objective):
    """The objectives awm and nft: each pass noises the final latents to the noise level of one trained step."""

    recorded: dict[tuple[int, int], Velocity] = field(default_factory=dict)

    def passes(self, trajectory: Trajectory) -> Sequence[int]:
        """The trained steps, at whose noise levels the videos are noised."""
        trained_steps = trained_steps_of(self.policy, self.config, self.step)
        return trained_steps(int(self.prompts.ids[trajectory.prompt_rows[0]]))

    @torch.no_grad()
    def prepare(self, trajectories: Sequence[Trajectory], updates_per_rollout: int) -> None:
        """Record the old velocities if later updates need them."""
        if updates_per_rollout == 1:
            return
        for trajectory in trajectories:
            for index in self.passes(trajectory):
                self.recorded[id(trajectory), index] = self._velocity_and_target(trajectory, index)[0]

    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        """The loss of one micro-batch at the noise level of step `index`, with gradients."""
        velocity, target = self._velocity_and_target(trajectory, index)
        old = self.recorded.get((id(trajectory), index), velocity.detach())
        advantages = self.advantages.of(trajectory.prompt_rows, trajectory.sample_index).to(velocity.device)
        matching_loss, settings = MATCHING_LOSSES[self.config.loss.objective], self.config.loss
        return matching_loss(VelocityMatch(velocity, old, target), advantages, self.config.bpgo.zeta, settings)

    def _velocity_and_target(self, trajectory: Trajectory, index: int) -> tuple[Velocity, Velocity]:
        latents, target = self.noised(trajectory, index, trajectory.sample_index)
        guidance = guidance_of(self.prompts, trajectory.prompt_rows, latents.device)
        return self.denoiser.velocity(latents.requires_grad_(torch.is_grad_enabled()), index, guidance), target

    def noised(
        self, trajectory: Trajectory, index: int, sample_index: Int[Tensor, "samples"]
    ) -> tuple[Latents, Velocity]:
        """The final videos at the noise level of step `index`, and their target noise - data.

        Args:
            sample_index: the sample of the prompt whose noise each video gets.
        """
        clean = trajectory.latents[:, -1].to(self.device).float()
        prompts = self.prompts.ids[trajectory.prompt_rows].tolist()
        samples = zip(prompts, sample_index.tolist(), strict=True)
        keys = [(self.config.run.seed, "forward process", self.step, *sample, index) for sample in samples]
        noise = keyed_noise(clean.shape[1:], keys, clean.device)
        sigma = self.denoiser.sigmas[index].to(clean.device)
        return (1 - sigma) * clean + sigma * noise, noise - clean
