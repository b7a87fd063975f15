"""How does a policy learn from final videos alone? By matching velocities on the forward process, weighed by advantage.

A rollout follows the ODE and keeps only its clean latents x0. For learning, x0 is noised again to the noise levels of
the trained steps, x = (1 - sigma) x0 + sigma eps, with the target velocity eps - x0. No log-prob of the rollout is
needed, hence any solver may sample.

- awm, advantage weighted matching (arXiv 2509.25050): -|v - target|^2, mean over latent dimensions, takes the place of
  the log-prob in the surrogate that GRPO minimises, ratio and clip included.
- nft, DiffusionNFT (arXiv 2509.16117): two implicit policies around the old velocity, v+ = (1 - beta) v_old + beta v
  and v- = (1 + beta) v_old - beta v; the loss is r |v+ - target|^2 + (1 - r) |v- - target|^2, where a sample's
  optimality r is its advantage brought from [-limit, limit], the advantage clip, to [0, 1].

Both take BPGO's advantages: w l(A) + zeta l(A~), on one forward. "Old" is the policy that sampled: velocities recorded
before the first update of a rollout, or, where there is only one update, the detached velocity itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import LossConfig
from bpgo_video.diffusion.flow_matching import matching_error
from bpgo_video.learner.bpgo import GroupAdvantages, LossAdvantages
from bpgo_video.learner.losses import PolicyShift, bpgo_loss, ratio_metrics
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.replay import Setting
from bpgo_video.rollouts.rollout import (
    Denoiser,
    TrainedSteps,
    guidance_of,
    trained_steps_of,
    training_denoiser,
)
from bpgo_video.types import Latents, Loss, PromptBatch, Trajectory, Velocity


@dataclass(frozen=True)
class Pair:
    """One pass: the velocity with gradients, the old one, and the target."""

    velocity: Velocity
    old: Velocity
    target: Velocity

    @property
    def move(self) -> PolicyShift:
        """What takes the place of a log-prob is minus the matching error."""
        return PolicyShift(matching_error(self.old, self.target) - matching_error(self.velocity, self.target))


@dataclass(frozen=True)
class MatchingSettings:
    """Of both objectives: zeta of BPGO and the trust region; of nft: beta, and the advantage that counts as certain."""

    zeta: float
    region: LossConfig
    beta: float
    limit: float


def nft_error(pair: Pair, advantage: Float[Tensor, "samples"], settings: MatchingSettings) -> Float[Tensor, "samples"]:
    """r |v+ - target|^2 + (1 - r) |v- - target|^2, r = 1/2 + clamp(A/limit, -1, 1)/2."""
    beta, optimality = settings.beta, 0.5 + 0.5 * (advantage / settings.limit).clamp(-1, 1)
    better = matching_error((1 - beta) * pair.old + beta * pair.velocity, pair.target)
    worse = matching_error((1 + beta) * pair.old - beta * pair.velocity, pair.target)
    return optimality * better + (1 - optimality) * worse


def awm_loss(pair: Pair, advantages: LossAdvantages, settings: MatchingSettings) -> Loss:
    """The clipped surrogate with the matching error in place of the log-prob."""
    own = advantages
    return bpgo_loss(pair.move, own.advantage, own.contrastive, own.trust, settings.zeta, settings.region)


def nft_loss(pair: Pair, advantages: LossAdvantages, settings: MatchingSettings) -> Loss:
    """w nft(A) + zeta nft(A~); the metrics are those of the matching error's ratio, which nothing clips."""

    def error(advantage: Tensor) -> Tensor:
        return nft_error(pair, advantage, settings)

    loss = advantages.trust * error(advantages.advantage)
    if settings.zeta != 0 and advantages.contrastive is not None:
        loss = loss + settings.zeta * error(advantages.contrastive)
    return Loss(loss.mean(), ratio_metrics(pair.move, advantages.advantage, settings.region))


MATCHING_LOSSES: dict[str, Callable[[Pair, LossAdvantages, MatchingSettings], Loss]] = {
    "awm": awm_loss,
    "nft": nft_loss,
}


@dataclass(frozen=True)
class ForwardProcess:
    """An objective over final latents: a pass is a noise level of the schedule."""

    kind: str
    denoiser: Denoiser
    prompts: PromptBatch
    advantages: GroupAdvantages
    settings: MatchingSettings
    trained_steps: TrainedSteps
    key: tuple[int | str, ...]
    device: torch.device
    recorded: dict[tuple[int, int], Velocity] = field(default_factory=dict)

    def passes(self, trajectory: Trajectory) -> Sequence[int]:
        return self.trained_steps(int(self.prompts.ids[trajectory.prompt_rows[0]]))

    @torch.no_grad()
    def prepare(self, trajectories: Sequence[Trajectory], updates_per_rollout: int) -> None:
        """Record the old velocities, where the policy will have moved by the time that they are needed."""
        if updates_per_rollout == 1:
            return
        for trajectory in trajectories:
            for index in self.passes(trajectory):
                self.recorded[id(trajectory), index] = self._velocity(trajectory, index)[0]

    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        velocity, target = self._velocity(trajectory, index)
        old = self.recorded.get((id(trajectory), index), velocity.detach())
        rows, samples, device = trajectory.prompt_rows, trajectory.sample_index, velocity.device
        own = self.advantages.of(rows, samples).to(device)
        return MATCHING_LOSSES[self.kind](Pair(velocity, old, target), own, self.settings)

    def _velocity(self, trajectory: Trajectory, index: int) -> tuple[Velocity, Velocity]:
        """The policy's velocity on noised final latents, and the one that it should have."""
        clean = trajectory.latents[:, -1].to(self.device).float()
        noise = self._noise(trajectory, index, clean)
        sigma = self.denoiser.sigmas[index].to(clean.device)
        noised = ((1 - sigma) * clean + sigma * noise).requires_grad_(torch.is_grad_enabled())
        guidance = guidance_of(self.prompts, trajectory.prompt_rows, clean.device)
        return self.denoiser.velocity(noised, index, guidance), noise - clean

    def _noise(self, trajectory: Trajectory, index: int, like: Latents) -> Latents:
        prompts = self.prompts.ids[trajectory.prompt_rows].tolist()
        owners = zip(prompts, trajectory.sample_index.tolist(), strict=True)
        return keyed_noise(like.shape[1:], [(*self.key, *owner, index) for owner in owners], like.device)


def forward_objective(setting: Setting, advantages: GroupAdvantages, step: int) -> ForwardProcess:
    config = setting.config
    return ForwardProcess(
        kind=config.loss.objective,
        denoiser=training_denoiser(setting.policy, config),
        prompts=setting.prompts,
        advantages=advantages,
        settings=MatchingSettings(config.bpgo.zeta, config.loss, config.loss.nft_beta, config.loss.advantage_clip),
        trained_steps=trained_steps_of(setting.policy, config, step),
        key=(config.run.seed, "forward process", step),
        device=setting.device,
    )
