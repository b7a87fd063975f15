"""How does a rollout become gradients? Its transitions again, now with gradients, into a surrogate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bpgo_video.config.bpgo import Config, LossConfig
from bpgo_video.diffusion import sde
from bpgo_video.diffusion.steps import flash_weight, split_updates, step_weights
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.learner.losses import PolicyShift, bpgo_loss
from bpgo_video.policies import Policy
from bpgo_video.rollouts.experts import trainable_steps
from bpgo_video.rollouts.reference import DIVERGENCES, Divergence, Reference
from bpgo_video.rollouts.rollout import Denoiser, guidance_of, pulls_to_previous, training_denoiser
from bpgo_video.types import Loss, PromptBatch, Trajectory


@runtime_checkable
class Learner(Protocol):
    """What an update needs of the engine."""

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self) -> float: ...


@runtime_checkable
class Objective(Protocol):
    """What is minimised over a rollout, one pass through the policy at a time."""

    def passes(self, trajectory: Trajectory) -> Sequence[int]:
        """The passes that a micro-batch takes; as many for each."""
        ...

    def prepare(self, trajectories: Sequence[Trajectory], updates_per_rollout: int) -> None:
        """Record what the updates need of the policy as it is before the first of them."""
        ...

    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        """The loss of one micro-batch in pass `index`, with gradients, at the batch shape of the rollout."""
        ...


@dataclass(frozen=True)
class Setting:
    """What an objective is built from, beside the advantages.

    Attributes:
        device: where the policy computes.
        reference: the starting policy, where the loss holds the policy near it.
    """

    policy: Policy
    config: Config
    prompts: PromptBatch
    device: torch.device
    reference: Reference | None = None


@dataclass(frozen=True)
class StepWeights:
    """The weight of each denoising step but the last in the loss, mean 1 over those that can be trained."""

    by_step: tuple[float, ...]

    @classmethod
    def of(cls, name: str, denoiser: Denoiser, trainable: Sequence[int]) -> StepWeights:
        sampler = sde.SAMPLERS[denoiser.sampler]
        return cls(tuple(step_weights(name, sampler, denoiser.steps, denoiser.eta, trainable)))


@dataclass(frozen=True)
class ReferenceAnchor:
    """A pull towards another policy: weight x divergence is added to the loss."""

    reference: Reference
    divergence: Divergence
    weight: float


@dataclass(frozen=True)
class PreviousAnchor:
    """A pull towards the policy that sampled: it asks for no forward, as the rollout recorded its transitions' means.

    Attributes:
        scale: by step, what makes the transitions' divergence one of velocities, or 1 for the means'.
    """

    weight: float
    scale: tuple[float, ...]

    @classmethod
    def of(cls, weight: float, space: str, denoiser: Denoiser) -> PreviousAnchor:
        """|v - v_old|^2 = 2 divergence / lambda^2, lambda = |d mean / d v| / std: means are linear in velocities."""
        if space == "mean":
            return cls(weight, (1.0,) * (len(denoiser.steps) - 1))
        sampler = sde.SAMPLERS[denoiser.sampler]
        inverse = (float(flash_weight(sampler, step, denoiser.eta)) for step in denoiser.steps[:-1])
        return cls(weight, tuple(2 * one**2 for one in inverse))


@dataclass(frozen=True)
class Replay:
    """The surrogate of BPGO and GRPO over the trained transitions of a rollout: a pass is a denoising step."""

    denoiser: Denoiser
    prompts: PromptBatch
    advantages: GroupAdvantages
    zeta: float
    loss_settings: LossConfig
    weights: StepWeights
    device: torch.device
    anchor: ReferenceAnchor | None = None
    previous: PreviousAnchor | None = None

    def passes(self, trajectory: Trajectory) -> Sequence[int]:
        return trajectory.trained_steps

    def prepare(self, trajectories: Sequence[Trajectory], updates_per_rollout: int) -> None:
        """Nothing: the rollout has recorded its log-probs."""

    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        rows, samples, device = trajectory.prompt_rows, trajectory.sample_index, self.device
        own = self.advantages.of(rows, samples).to(device)
        # With frozen weights under adapters, a block's hooks (ZeRO-3, checkpointing) need an input with a gradient.
        latents = trajectory.latents[:, index].to(device).detach().requires_grad_()
        guidance = guidance_of(self.prompts, rows, device)
        reference = None
        if self.anchor is not None:
            reference = self.anchor.reference.velocity(self.denoiser, latents, index, guidance)
        velocity = self.denoiser.velocity(latents, index, guidance)
        move = self._move(trajectory, index, self.denoiser.transition_of(velocity, latents, index))
        loss = bpgo_loss(
            move=move,
            advantage=own.advantage,
            contrastive=own.contrastive,
            trust=own.trust,
            zeta=self.zeta,
            settings=self.loss_settings,
        )
        value, metrics = self.weights.by_step[index] * loss.value, dict(loss.metrics)
        if self.anchor is not None and reference is not None:
            transition_of = partial(self.denoiser.transition_of, latents=latents, index=index)
            divergence = self.anchor.divergence(velocity, reference, transition_of).mean()
            value, metrics["kl"] = value + self.anchor.weight * divergence, divergence.detach()
        if self.previous is not None and move.divergence is not None:
            divergence = self.previous.scale[index] * move.divergence.mean()
            value, metrics["kl"] = value + self.previous.weight * divergence, divergence.detach()
        return Loss(value, metrics)

    @staticmethod
    def _move(trajectory: Trajectory, index: int, transition: sde.Transition) -> PolicyShift:
        """How far the policy has moved on step `index` since the rollout, a row per sample or credited frame."""
        device = transition.mean.device
        reached, by_frame = trajectory.latents[:, index + 1].to(device), trajectory.frame_log_probs
        if by_frame is None:
            log_ratio = transition.log_prob(reached) - trajectory.log_probs[:, index].to(device)
        else:
            log_ratio = (transition.frame_log_prob(reached) - by_frame[:, index].to(device)).flatten()
        if trajectory.means is None:
            return PolicyShift(log_ratio)
        old_mean = trajectory.means[:, trajectory.trained_steps.index(index)].to(device)
        over = (1, 2, 3, 4) if by_frame is None else (1, 3, 4)
        divergence = ((transition.mean - old_mean) / transition.std).square().mean(dim=over).flatten() / 2
        return PolicyShift(log_ratio, divergence, transition.std.to(log_ratio))


def replay_objective(setting: Setting, advantages: GroupAdvantages, step: int) -> Replay:
    config = setting.config
    denoiser = training_denoiser(setting.policy, config)
    anchor = None
    if setting.reference is not None:
        anchor = ReferenceAnchor(setting.reference, DIVERGENCES[config.loss.kl_space], config.loss.kl_weight)
    previous = None
    if pulls_to_previous(config):
        previous = PreviousAnchor.of(config.loss.kl_weight, config.loss.kl_space, denoiser)
    return Replay(
        denoiser=denoiser,
        prompts=setting.prompts,
        advantages=advantages,
        zeta=config.bpgo.zeta,
        loss_settings=config.loss,
        weights=StepWeights.of(config.loss.step_weights, denoiser, trainable_steps(setting.policy, config)),
        device=setting.device,
        anchor=anchor,
        previous=previous,
    )


@dataclass(frozen=True)
class Update:
    """What the optimiser updates of one rollout did, on this rank.

    Attributes:
        metrics: means over micro-batches of the loss's metrics, `grad_norm` (mean over updates) and
            `ratio_error_first_update_max`: the largest |ratio - 1| before the first update, 0 where replay is exact.
        passes: index and metrics of each pass.
    """

    metrics: dict[str, float]
    passes: list[tuple[int, Mapping[str, Tensor]]]


def optimise(
    learner: Learner, objective: Objective, trajectories: Sequence[Trajectory], updates_per_rollout: int
) -> Update:
    """The optimiser updates of one rollout, all against what the rollout recorded."""
    objective.prepare(trajectories, updates_per_rollout)
    dealt = [split_updates(objective.passes(trajectory), updates_per_rollout) for trajectory in trajectories]
    losses: list[tuple[int, Mapping[str, Tensor]]] = []
    norms, first_error = [], 0.0
    for update in range(updates_per_rollout):
        units = [
            (trajectory, index)
            for trajectory, shares in zip(trajectories, dealt, strict=True)
            for index in shares[update]
        ]
        for number, (trajectory, index) in enumerate(units, start=1):
            loss = objective.loss(trajectory, index)
            learner.backward(loss.value / len(units), last=number == len(units))
            losses.append((index, {**loss.metrics, "loss": loss.value.detach()}))
            if update == 0:
                error = torch.maximum(loss.metrics["ratio_max"] - 1, 1 - loss.metrics["ratio_min"])
                first_error = float(torch.maximum(error.new_tensor(first_error), error))  # nan stays nan
        norms.append(learner.step())
    summary = _summary([metrics for _, metrics in losses])
    own = {"grad_norm": sum(norms) / len(norms), "ratio_error_first_update_max": first_error}
    return Update({**summary, **own}, losses)


def _summary(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Extremes of keys that end in _min and _max, means of the others."""
    summary = {}
    for name in losses[0]:
        values = torch.stack([metrics[name] for metrics in losses])
        pick = values.amax if name.endswith("_max") else values.amin if name.endswith("_min") else values.mean
        summary[name] = float(pick())
    return summary
