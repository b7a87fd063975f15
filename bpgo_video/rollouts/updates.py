"""The optimizer updates of one rollout: the interface of objectives, the update loop, and its metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import Config
from bpgo_video.diffusion.flow_matching import matching_error
from bpgo_video.diffusion.sde import Transition
from bpgo_video.diffusion.steps import split_updates
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.learner.losses import RATIO_ERROR, with_spread
from bpgo_video.policies import Policy
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.denoiser import Denoiser, training_denoiser
from bpgo_video.types import Guidance, Latents, Loss, PromptBatch, Trajectory, Velocity

# The largest |ratio - 1| of the first update: the replay's error, or with it how far the policy has moved since it
# sampled, if a step sampled ahead, or how far it is from the average that sampled.
EXACT, OLDER, AVERAGE = "ratio_error_first_update_max", "ratio_shift_first_update_max", "ratio_to_average_max"
# Metrics logged for each denoising step. The largest log ratio is also the noise floor: 0 in an exact replay.
BY_STEP = ("log_ratio_abs_max", "ratio_mean", RATIO_ERROR, "clip_fraction/positive", "clip_fraction/negative")


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
    def velocity(
        self, denoiser: Denoiser, latents: Latents, index: int, guidance: Guidance, sigma: Tensor | None = None
    ) -> Velocity:
        """The reference's velocity at denoising step `index`; its arguments are those of `Denoiser.velocity`.

        Call it before the policy's own forward, whose weights must not change until its backward.
        """
        with self.weights():
            return replace(denoiser, policy=self.policy).velocity(latents, index, guidance, sigma)


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


@dataclass(frozen=True)
class Objective(ABC):
    """A loss on the trajectories of one training step, computed in passes through the policy.

    Attributes:
        step: training step, counted from 0.
        device: where the policy computes.
        reference: the policy of the KL term or of DPO, unless that is the policy that sampled; with
            `loss.old_decay` the slowly moving policy that sampled.
        suite: the rewards, for objectives that differentiate them.
    """

    policy: Policy
    config: Config
    prompts: PromptBatch
    advantages: GroupAdvantages
    step: int
    device: torch.device
    reference: Reference | None = None
    suite: RewardSuite | None = None

    @cached_property
    def denoiser(self) -> Denoiser:
        return training_denoiser(self.policy, self.config)

    @abstractmethod
    def passes(self, trajectory: Trajectory) -> Sequence[int]:
        """The denoising steps at which the loss of a micro-batch is computed; equally many for each micro-batch."""

    def parts(self, trajectory: Trajectory, index: int) -> Sequence[Trajectory]:
        """The trajectory as it is computed at denoising step `index`: in one forward, or in several."""
        return [trajectory]

    @abstractmethod
    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        """The loss of one micro-batch at denoising step `index`, with gradients; batched as in the rollout."""

    def prepare(self, trajectories: Sequence[Trajectory], updates_per_rollout: int) -> None:  # noqa: B027
        """Record what later updates need of the policy that sampled; called before the first update.

        With `rollout.sample_ahead` the policy has had the updates of a step since it sampled.
        """

    def arranged(self, trajectories: Sequence[Trajectory], mesh: Mesh) -> tuple[Objective, Sequence[Trajectory]]:
        """The objective of the updates and their micro-batches, of those of this rank's rollout. Collective.

        Every rank gets equally many.
        """
        return self, trajectories


@runtime_checkable
class Learner(Protocol):
    """The part of the engine that an update uses."""

    def replaying(self) -> AbstractContextManager[None]:
        """The block around the micro-batches of an update; `step` follows it."""

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self) -> float:
        """Update, unless the gradient is not finite on any rank; the gradient's norm."""


@dataclass(frozen=True)
class UpdateStats:
    """Statistics of the optimizer updates of one rollout, on this rank.

    Attributes:
        metrics: means over micro-batches of the loss's metrics, `grad_norm` (mean over updates),
            `ratio_error_first_update_max`: the largest |ratio - 1| before the first update, 0 in an exact replay, of
            objectives with a ratio, and
            `updates_skipped`, because their gradients were not finite; such updates are left out of the means.
        passes: denoising step and metrics of each pass.
    """

    metrics: dict[str, float]
    passes: list[tuple[int, Mapping[str, Tensor]]]

    def of_other_weights(self, shift: str) -> UpdateStats:
        """The same of a rollout that other weights sampled: its first ratio is not EXACT, but OLDER or AVERAGE."""
        return replace(self, metrics={shift if name == EXACT else name: value for name, value in self.metrics.items()})


def optimise(
    learner: Learner, objective: Objective, trajectories: Sequence[Trajectory], updates_per_rollout: int
) -> UpdateStats:
    """The optimizer updates of one rollout, all relative to the policy that sampled it."""
    objective.prepare(trajectories, updates_per_rollout)
    shares = [split_updates(objective.passes(trajectory), updates_per_rollout) for trajectory in trajectories]
    passes: list[tuple[int, Mapping[str, Tensor]]] = []
    norms, first_error = [], 0.0
    for update in range(updates_per_rollout):
        micro_batches = [
            (part, index, len(part) / len(trajectory))
            for trajectory, share in zip(trajectories, shares, strict=True)
            for index in share[update]
            for part in objective.parts(trajectory, index)
        ]
        count = sum(len(share[update]) for share in shares)
        of_update: list[tuple[int, Mapping[str, Tensor]]] = []
        with learner.replaying():
            for number, (part, index, weight) in enumerate(micro_batches, start=1):
                loss = objective.loss(part, index)
                learner.backward(loss.value * weight / count, last=number == len(micro_batches))
                of_update.append((index, {**loss.metrics, "loss": loss.value.detach()}))
                if update == 0 and objective.config.loss.has_ratio:
                    error = ratio_error(loss.metrics)
                    first_error = float(torch.maximum(error.new_tensor(first_error), error))  # nan stays nan
        norm = learner.step()
        if math.isfinite(norm):
            norms.append(norm)
            passes += of_update
    metrics = {"updates_skipped": float(updates_per_rollout - len(norms))}
    metrics |= {EXACT: first_error} if objective.config.loss.has_ratio else {}
    if norms:
        metrics |= {name: _reduced(name, [metrics[name] for _, metrics in passes]) for name in passes[0][1]}
        metrics |= {"grad_norm": sum(norms) / len(norms)}
    return UpdateStats(metrics, passes)


def ratio_error(metrics: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """The largest |ratio - 1| of a pass; nan if a ratio is."""
    return torch.maximum(metrics["ratio_max"] - 1, 1 - metrics["ratio_min"])


def _reduced(name: str, values: Sequence[Tensor]) -> float:
    """Extremes of metrics whose names end in _min or _max, means of the others."""
    stacked = torch.stack(list(values))
    if name.endswith("_max"):
        return float(stacked.amax())
    return float(stacked.amin() if name.endswith("_min") else stacked.mean())


def step_sums(passes: Iterable[tuple[int, Mapping[str, Tensor]]], num_steps: int) -> Float[Tensor, "steps columns"]:
    """For each denoising step the sums of BY_STEP over passes, then the number of passes; to be summed over ranks."""
    sums = torch.zeros(num_steps, len(BY_STEP) + 1, dtype=torch.float64)
    for index, metrics in passes:
        if not all(name in metrics for name in BY_STEP):  # of an objective without a ratio
            continue
        sums[index, :-1] += torch.stack([metrics[name].double().cpu() for name in BY_STEP])
        sums[index, -1] += 1
    return sums


def step_metrics(sums: Float[Tensor, "steps columns"]) -> dict[str, float]:
    """`timestep/INDEX/NAME`: means over the passes of all ranks; untrained steps are left out."""
    metrics: dict[str, float] = {}
    for index in sums[:, -1].nonzero().flatten().tolist():
        means = dict(zip(BY_STEP, (sums[index, :-1] / sums[index, -1]).tolist(), strict=True))
        metrics |= {f"timestep/{index:02d}/{name}": value for name, value in with_spread(means).items()}
    return metrics
