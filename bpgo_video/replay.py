"""How does a rollout become gradients? Its transitions again, now with gradients, into the clipped surrogate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bpgo_video.bpgo import GroupAdvantages
from bpgo_video.losses import bpgo_loss
from bpgo_video.rollout import Denoiser, rows_of
from bpgo_video.steps import split_updates
from bpgo_video.types import Conditioning, Loss, PromptBatch, Trajectory


@runtime_checkable
class Learner(Protocol):
    """What an update needs of the engine."""

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self) -> float: ...


def replay_loss(
    denoiser: Denoiser,
    trajectory: Trajectory,
    index: int,
    prompts: PromptBatch,
    negative: Conditioning,
    advantages: GroupAdvantages,
    zeta: float,
    clip_range: tuple[float, float],
) -> Loss:
    """The loss of one micro-batch at one trained step, at the batch shape of the rollout."""
    rows, samples = trajectory.prompt_rows, trajectory.sample_index
    device = trajectory.latents.device
    conditioning = rows_of(prompts.conditioning, rows, device)
    # With frozen weights under adapters, a block's hooks (ZeRO-3, checkpointing) need an input that takes a gradient.
    latents = trajectory.latents[:, index].detach().requires_grad_()
    transition = denoiser.transition(latents, index, conditioning, negative)
    contrastive = advantages.contrastive
    return bpgo_loss(
        log_prob=transition.log_prob(trajectory.latents[:, index + 1]),
        old_log_prob=trajectory.log_probs[:, index],
        advantage=advantages.advantage[rows, samples].to(device),
        contrastive=None if contrastive is None else contrastive[rows, samples].to(device),
        trust=advantages.trust[rows].to(device),
        zeta=zeta,
        clip_range=clip_range,
    )


def optimise(
    learner: Learner,
    denoiser: Denoiser,
    trajectories: Sequence[Trajectory],
    prompts: PromptBatch,
    negative: Conditioning,
    advantages: GroupAdvantages,
    *,
    updates_per_rollout: int,
    zeta: float,
    clip_range: tuple[float, float],
) -> dict[str, float]:
    """The optimiser updates of one rollout, all against the log-probs that the rollout recorded.

    Returns:
        Means over micro-batches of the loss's metrics, `grad_norm` (mean over updates) and
        `ratio_error_first_update_max`: the largest |ratio - 1| before the first update, 0 where replay is exact.
    """
    losses: list[Mapping[str, Tensor]] = []
    norms, first_error = [], 0.0
    for update, steps in enumerate(split_updates(denoiser.trained_steps, updates_per_rollout)):
        units = [(trajectory, index) for trajectory in trajectories for index in steps]
        for number, (trajectory, index) in enumerate(units, start=1):
            loss = replay_loss(denoiser, trajectory, index, prompts, negative, advantages, zeta, clip_range)
            learner.backward(loss.value / len(units), last=number == len(units))
            losses.append({**loss.metrics, "loss": loss.value.detach()})
            if update == 0:
                error = torch.maximum(loss.metrics["ratio_max"] - 1, 1 - loss.metrics["ratio_min"])
                first_error = float(torch.maximum(torch.tensor(first_error), error))  # nan stays nan
        norms.append(learner.step())
    return {**_summary(losses), "grad_norm": sum(norms) / len(norms), "ratio_error_first_update_max": first_error}


def _summary(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Extremes of keys that end in _min and _max, means of the others."""
    summary = {}
    for name in losses[0]:
        values = torch.stack([metrics[name] for metrics in losses])
        pick = values.amax if name.endswith("_max") else values.amin if name.endswith("_min") else values.mean
        summary[name] = float(pick())
    return summary
