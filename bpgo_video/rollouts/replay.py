"""Replay of a rollout with gradients: the policy-gradient objective, and the samples that are worth replaying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool
from more_itertools import chunked
from torch import Tensor

from bpgo_video.config.branching import leaves_below
from bpgo_video.diffusion import sde
from bpgo_video.diffusion.steps import flash_weight, step_weights
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.losses import PolicyShift, bpgo_loss
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import pulls_to_previous
from bpgo_video.rollouts.draft import DifferentiatedRewards
from bpgo_video.rollouts.forward_process import ForwardProcess
from bpgo_video.rollouts.preferences import Preferences, Utilities
from bpgo_video.rollouts.rules import trainable_steps
from bpgo_video.rollouts.tree import Tree
from bpgo_video.rollouts.updates import DIVERGENCES, Objective
from bpgo_video.types import Loss, Table, Trajectory


@dataclass(frozen=True)
class Replay(Objective):
    """The policy-gradient objective: BPGO's and GRPO's surrogate over the trained transitions of a rollout."""

    @cached_property
    def step_weights(self) -> list[float]:
        """The loss weight of each denoising step but the last."""
        denoiser, trainable = self.denoiser, trainable_steps(self.policy, self.config)
        sampler = sde.SAMPLERS[denoiser.sampler]
        return step_weights(self.config.loss.step_weights, sampler, denoiser.steps, denoiser.eta, trainable)

    def passes(self, trajectory: Trajectory) -> Sequence[int]:
        return trajectory.trained_steps

    def parts(self, trajectory: Trajectory, index: int) -> list[Trajectory]:
        """As many samples as share the nodes of a micro-batch: the nodes of the rollout's forwards."""
        tree = self._tree(trajectory)
        stride = tree.stride(trajectory.trained_steps.index(index))
        batches = tree.batches(len(trajectory) // stride)
        return [trajectory.part(slice(nodes.start * stride, nodes.stop * stride)) for nodes in batches]

    def _tree(self, trajectory: Trajectory) -> Tree:
        rollout = self.config.rollout
        return Tree(len(trajectory), rollout.branches, rollout.micro_batch_size if rollout.branches else None)

    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        """surr(ratio, w A) + zeta surr(ratio, A~) of one transition, times its step weight, plus the KL term.

        In a tree one forward is of each node, and the ratios are of its children.
        """
        settings, tree, depth = self.config.loss, self._tree(trajectory), trajectory.trained_steps.index(index)
        nodes, children = (trajectory.part(slice(None, None, tree.stride(level))) for level in (depth, depth + 1))
        below = leaves_below(self.config.rollout.branches, depth + 1)
        averaged = self.advantages.averaged_below(below, self.config.advantage.depth_normalise)
        advantages = averaged.of(children.prompt_rows, children.sample_index).to(self.device)
        # With frozen weights under adapters, a block's hooks (ZeRO-3, checkpointing) need an input with a gradient.
        latents = nodes.latents[:, index].to(self.device).detach().requires_grad_()
        guidance = guidance_of(self.prompts, nodes.prompt_rows, self.device)
        reference = None
        if self.reference is not None:
            reference = self.reference.velocity(self.denoiser, latents, index, guidance)
        velocity = self.denoiser.velocity(latents, index, guidance)
        transition = self.denoiser.transition_of(velocity, latents, index)
        shift = policy_shift(children, index, transition.repeated(len(children) // len(nodes)))
        loss = bpgo_loss(shift, advantages.advantage, advantages.contrastive, self.config.bpgo.zeta, settings)
        value, metrics = self.step_weights[index] * loss.value, dict(loss.metrics)
        divergence = None
        if reference is not None:
            transition_of = partial(self.denoiser.transition_of, latents=latents, index=index)
            divergence = DIVERGENCES[settings.kl_space](velocity, reference, transition_of).mean()
        elif pulls_to_previous(settings) and shift.divergence is not None:
            divergence = self._previous_scale(index) * shift.divergence.mean()
        if divergence is not None:
            value, metrics["kl"] = value + settings.kl_weight * divergence, divergence.detach()
        return Loss(value, metrics)

    def _previous_scale(self, index: int) -> float:
        """|v - v_old|^2 = 2 divergence / lambda^2,   lambda = |d mean / d v| / std (means are linear in the velocity)

        The factor from the divergence of the recorded means, which costs no forward, to that of velocities.
        """
        if self.config.loss.kl_space == "mean":
            return 1.0
        sampler = sde.SAMPLERS[self.denoiser.sampler]
        return 2 * float(flash_weight(sampler, self.denoiser.steps[index], self.denoiser.eta)) ** 2


OBJECTIVES: Table[type[Objective]] = Table(
    {
        "policy_gradient": Replay,
        "awm": ForwardProcess,
        "nft": ForwardProcess,
        "dpo": Preferences,
        "kto": Utilities,
        "draft": DifferentiatedRewards,
    }
)


def policy_shift(trajectory: Trajectory, index: int, transition: sde.Transition) -> PolicyShift:
    """Log ratio (and divergence, if means are recorded) of step `index` against the rollout's recorded transition.

    One row per sample, or per latent frame if frames are credited.
    """
    device = transition.mean.device
    reached, by_frame = trajectory.latents[:, index + 1].to(device), trajectory.frame_log_probs
    if by_frame is None:
        log_ratio = transition.log_prob(reached) - trajectory.log_probs[:, index].to(device)
    else:
        log_ratio = (transition.frame_log_prob(reached) - by_frame[:, index].to(device)).flatten()
    if trajectory.means is None:
        return PolicyShift(log_ratio)
    old_mean = trajectory.means[:, trajectory.trained_steps.index(index)].to(device)
    dims = (1, 2, 3, 4) if by_frame is None else (1, 3, 4)
    divergence = ((transition.mean - old_mean) / transition.std).square().mean(dim=dims).flatten() / 2
    return PolicyShift(log_ratio, divergence, transition.std.to(log_ratio))


SampleRef = tuple[Trajectory, int]  # a sample: its micro-batch and its row there


def samples_to_replay(
    trajectories: Sequence[Trajectory], trains: Bool[Tensor, "prompts group"], by_prompt: bool, mesh: Mesh
) -> list[Trajectory]:
    """This rank's micro-batches without samples of advantage 0, which add nothing to the gradient.

    ZeRO-3 gathers parameters collectively, so all ranks need equally many micro-batches: a rank with fewer samples to
    replay fills up with others of its own, of advantage 0.

    Args:
        trajectories: this rank's micro-batches, equally many of equal size on every rank.
        trains: which samples have an advantage; the same on every rank.
        by_prompt: prompts differ in their trained steps, so a micro-batch must hold samples of one prompt only.
    """
    groups: dict[int, list[SampleRef]] = {}
    for trajectory in trajectories:
        for row, prompt in enumerate(trajectory.prompt_rows.tolist()):
            groups.setdefault(prompt if by_prompt else 0, []).append((trajectory, row))

    def is_idle(sample: SampleRef) -> bool:
        trajectory, row = sample
        return not trains[trajectory.prompt_rows[row], trajectory.sample_index[row]]

    needed: list[list[SampleRef]] = []
    spare: list[list[SampleRef]] = []
    for group in groups.values():
        for batch in chunked(sorted(group, key=is_idle), len(trajectories[0])):  # samples that train come first
            (spare if all(map(is_idle, batch)) else needed).append(batch)
    count = max(1, mesh.largest(len(needed)))
    return [_joined(samples) for samples in needed + spare[: count - len(needed)]]


def _joined(samples: Sequence[SampleRef]) -> Trajectory:
    """One micro-batch of these samples."""
    first = samples[0][0]
    names = [name for name, value in vars(first).items() if isinstance(value, Tensor)]
    rows: dict[str, Any] = {
        name: torch.stack([getattr(trajectory, name)[row] for trajectory, row in samples]) for name in names
    }
    return replace(first, **rows)
