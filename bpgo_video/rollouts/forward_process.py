"""Losses on the forward process: supervised flow matching on clips, AWM and NFT on a rollout's final videos.

All three noise clean latents, x = (1 - sigma) x0 + sigma eps, and compare the velocity with the target eps - x0. AWM
and NFT need no log-prob of the rollout, so any solver may sample; they learn at the noise levels of the trained steps,
or at levels drawn for each sample.

- awm, advantage weighted matching (arXiv 2509.25050): -|v - target|^2, the mean over latent dimensions, replaces the
  log-prob in GRPO's surrogate, ratio and clip included.
- nft, DiffusionNFT (arXiv 2509.16117): with v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v, the loss
  is r |v+ - target|^2 + (1 - r) |v- - target|^2. The optimality r maps the advantage from [-limit, limit] to [0, 1].
  As in the authors' code, each square may be divided by the mean absolute error of the clean video that it predicts,
  and the loss be multiplied by limit/beta.

Both take BPGO's advantages: l(w A) + zeta l(A~), on one forward. "Old" is the policy that sampled: a slowly moving
average of the weights (`loss.old_decay`), or the policy before the updates. Its velocities are recorded before the
first update of a rollout; with a single update and no average they are the detached velocity itself. The authors' KL to
the starting policy is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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
from bpgo_video.rollouts.denoiser import Denoiser
from bpgo_video.rollouts.rules import trained_steps_of
from bpgo_video.rollouts.updates import Objective, Reference
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


SMALLEST_ERROR = 1e-5  # of a predicted clean video, by which its squared error is divided


@dataclass(frozen=True)
class VelocityMatch:
    """The policy's velocity with gradients, the sampling policy's velocity, and their target noise - data.

    Attributes:
        sigma: noise levels, 0-dim or one for each sample.
    """

    velocity: Velocity
    old: Velocity
    target: Velocity
    sigma: Float[Tensor, "*samples"]

    @property
    def shift(self) -> PolicyShift:
        """The policy shift with minus the matching error as log-prob."""
        return PolicyShift(matching_error(self.old, self.target) - matching_error(self.velocity, self.target))


def clean_error(velocity: Velocity, target: Velocity, sigma: Float[Tensor, "*samples"]) -> Float[Tensor, "samples"]:
    """|x - x0|^2 / max(mean|x - x0|, 1e-5), of the clean video that a velocity predicts: x - x0 = sigma (target - v)

    The divisor has no gradient (DiffusionNFT's code): each sample counts by the size of its error, not by its square.
    """
    level = sigma.to(velocity.device)
    size = level * (velocity - target).detach().abs().flatten(1).mean(dim=1)
    return level**2 * matching_error(velocity, target) / size.clamp(min=SMALLEST_ERROR)


def nft_error(
    match: VelocityMatch, advantage: Float[Tensor, "samples"], settings: LossConfig
) -> Float[Tensor, "samples"]:
    """scale (r e(v+) + (1 - r) e(v-)),   r = 1/2 + clamp(A/limit, -1, 1)/2,   limit = advantage_clip

    e(v) is |v - target|^2, or with `nft_adaptive` `clean_error`; scale is 1, or with `nft_rescale` limit/beta: the
    gradient where v = v_old, A times that of e(v), then depends on neither.
    """
    beta, limit = settings.nft_beta, settings.advantage_clip
    optimality = 0.5 + 0.5 * (advantage / limit).clamp(-1, 1)
    better, worse = (
        clean_error(velocity, match.target, match.sigma)
        if settings.nft_adaptive
        else matching_error(velocity, match.target)
        for velocity in (
            (1 - beta) * match.old + beta * match.velocity,
            (1 + beta) * match.old - beta * match.velocity,
        )
    )
    error = optimality * better + (1 - optimality) * worse
    return error * (limit / beta) if settings.nft_rescale else error


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


class Noised(NamedTuple):
    """Final videos of a micro-batch on the policy's device, at noise levels (on the CPU), and their noise - data."""

    latents: Latents
    target: Velocity
    sigma: Float[Tensor, "*samples"]


@dataclass(frozen=True)
class ForwardProcess(Objective):
    """The objectives awm and nft: each pass noises the final latents to the noise level of one trained step."""

    recorded: dict[tuple[int, int], Velocity] = field(default_factory=dict)

    def passes(self, trajectory: Trajectory) -> Sequence[int]:
        """The trained steps, at whose noise levels the videos are noised; or by whose transformers, at drawn levels."""
        trained_steps = trained_steps_of(self.policy, self.config, self.step)
        return trained_steps(int(self.prompts.ids[trajectory.prompt_rows[0]]))

    @torch.no_grad()
    def prepare(self, trajectories: Sequence[Trajectory], updates_per_rollout: int) -> None:
        """Record the old velocities, where the trajectories are, if they are not those of each pass itself."""
        if updates_per_rollout == 1 and self.reference is None:
            return
        old = self.reference or Reference(self.policy)
        denoiser = replace(self.denoiser, policy=old.policy)
        with old.weights():
            for trajectory in trajectories:
                for index in self.passes(trajectory):
                    noised = self.noised(trajectory, index, trajectory.sample_index)
                    velocity = self._velocity(denoiser, trajectory, noised, index)
                    self.recorded[id(trajectory), index] = velocity.to(trajectory.latents.device)

    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        """The loss of one micro-batch at the noise levels of step `index`, with gradients."""
        noised = self.noised(trajectory, index, trajectory.sample_index)
        velocity = self._velocity(self.denoiser, trajectory, noised, index)
        old = self.recorded.get((id(trajectory), index), velocity.detach()).to(velocity.device)
        advantages = self.advantages.of(trajectory.prompt_rows, trajectory.sample_index).to(velocity.device)
        matching_loss, settings = MATCHING_LOSSES[self.config.loss.objective], self.config.loss
        match = VelocityMatch(velocity, old, noised.target, noised.sigma)
        return matching_loss(match, advantages, self.config.bpgo.zeta, settings)

    def _velocity(self, denoiser: Denoiser, trajectory: Trajectory, noised: Noised, index: int) -> Velocity:
        guidance = guidance_of(self.prompts, trajectory.prompt_rows, noised.latents.device)
        latents = noised.latents.requires_grad_(torch.is_grad_enabled())
        return denoiser.velocity(latents, index, guidance, noised.sigma)

    def noised(self, trajectory: Trajectory, index: int, sample_index: Int[Tensor, "samples"]) -> Noised:
        """The final videos at the noise level of step `index`, or at drawn levels of the same transformer.

        Args:
            sample_index: the sample of the prompt whose noise and level each video gets.
        """
        clean = trajectory.latents[:, -1].to(self.device).float()
        prompts = self.prompts.ids[trajectory.prompt_rows].tolist()
        samples = zip(prompts, sample_index.tolist(), strict=True)
        keys = [(self.config.run.seed, "forward process", self.step, *sample, index) for sample in samples]
        noise = keyed_noise(clean.shape[1:], keys, clean.device)
        sigma = self.levels(keys, index)
        return Noised(flow_matching.noised(clean, noise, sigma.expand(len(clean))), noise - clean, sigma)

    def levels(self, keys: Sequence[flow_matching.Key], index: int) -> Float[Tensor, "*samples"]:
        """The noise level of step `index`, or one drawn for each key."""
        denoiser, density = self.denoiser, self.config.loss.noise_levels
        if density == "schedule":
            return denoiser.sigmas[index]
        distribution, transformer = flow_matching.LevelDistribution(density), denoiser.transformer_at(index)

        def computes(sigma: float) -> bool:
            return self.policy.transformer_at(sigma) == transformer

        return torch.stack([distribution.draw(key, denoiser.sigmas, computes) for key in keys])
