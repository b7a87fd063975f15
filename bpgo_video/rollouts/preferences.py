"""The objectives `dpo` and `kto`: final videos of a group, better and worse ones, against a reference policy.

`dpo`: online Flow-DPO, which is Diffusion-DPO (arXiv 2311.12908) on velocities (Flow-DPO, arXiv 2501.13918), with pairs
that the policy sampled in this step. Both videos of a pair get the same noise and noise level, so that what differs is
the videos. The label of a pair is the posterior probability that its winner is truly better (`learner/preferences.py`).

The partners of a pair may be on different ranks, and a rank may have none: the pairs of all prompts are listed in the
same order on every rank and divided evenly, and each rank receives the latents of its own.

`kto`: online Diffusion-KTO (arXiv 2404.04465), where each video counts alone, as desirable or not by the sign of its
advantage.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.diffusion.flow_matching import matching_error
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.preferences import Pairs, dpo_loss, kto_loss
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.forward_process import ForwardProcess
from bpgo_video.types import Loss, Trajectory

Sample = tuple[int, int]  # a prompt's row, and the position in its group


class Gains(NamedTuple):
    """|v_ref - target|^2 - |v - target|^2 with gradients, and |v - v_ref|^2 without; means over latent dimensions."""

    gain: Float[Tensor, "samples"]
    distance: Float[Tensor, "samples"]


@dataclass(frozen=True)
class AgainstReference(ForwardProcess):
    """What DPO and KTO share: how much better than the reference the policy predicts final videos."""

    def prepare(self, trajectories: Sequence[Trajectory], updates_per_rollout: int) -> None:
        """Nothing: the reference does not change."""

    def gains(self, trajectory: Trajectory, index: int, sample_index: Int[Tensor, "samples"]) -> Gains:
        """Of a micro-batch at the noise levels of step `index`; `sample_index` is that of `noised`."""
        assert self.reference is not None
        latents, target, sigma = self.noised(trajectory, index, sample_index)
        guidance = guidance_of(self.prompts, trajectory.prompt_rows, latents.device)
        reference = self.reference.velocity(self.denoiser, latents, index, guidance, sigma)
        velocity = self.denoiser.velocity(latents.requires_grad_(), index, guidance, sigma)
        gain = matching_error(reference, target) - matching_error(velocity, target)
        return Gains(gain, matching_error(velocity.detach(), reference))


@dataclass(frozen=True)
class Utilities(AgainstReference):
    """KTO on the samples of a step."""

    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        """The loss of the samples of a micro-batch at the noise levels of step `index`, with gradients."""
        rows, samples = trajectory.prompt_rows, trajectory.sample_index
        gain, distance = self.gains(trajectory, index, samples)
        advantage, trust = self.advantages.advantage[rows, samples], self.advantages.trust[rows]
        found = kto_loss(gain, distance, advantage.to(gain), trust.to(gain), self.config.loss.dpo_beta)
        return Loss(found.value, {**found.metrics, "preference/reference_distance": distance.mean()})


@dataclass(frozen=True)
class Preferences(AgainstReference):
    """DPO on the pairs of a step. The samples of a micro-batch are winner, loser, winner, loser, ...

    Attributes:
        scale: rows of all micro-batches for each pair of the step: above 1 if pairs do not divide evenly.
    """

    scale: float = 1.0

    @cached_property
    def pairs(self) -> Pairs:
        """Of all prompts; the same on every rank."""
        assert self.advantages.posterior is not None
        return self.advantages.posterior.best_against_worst(self.config.loss.dpo_pairs)

    def arranged(self, trajectories: Sequence[Trajectory], mesh: Mesh) -> tuple[Preferences, Sequence[Trajectory]]:
        """This rank's pairs, equally many on every rank; a sample against itself, which is no pair, fills them up."""
        winner, loser = self.pairs.winner, self.pairs.loser
        rows = torch.arange(len(winner))[:, None].expand_as(winner)
        pairs = torch.stack([rows, winner, rows, loser], dim=2).reshape(-1, 2, 2)  # the two samples of each
        at_once = len(trajectories[0]) // 2
        missing = -len(pairs) % (mesh.data_size * at_once)
        filled = torch.cat([pairs, pairs[:1, :1].expand(missing, 2, 2)])
        shares = [filled[numbers].flatten(0, 1) for numbers in mesh.share(len(filled), at_once)]
        wanted: set[Sample] = {(row, sample) for share in shares for row, sample in share.tolist()}
        latents = final_latents(trajectories, wanted, mesh)
        steps, no_log_probs = trajectories[0].trained_steps, trajectories[0].log_probs[:1, :0]
        batches = [
            Trajectory(
                *(share[:, 0], share[:, 1], steps),
                torch.stack([latents[row, sample] for row, sample in share.tolist()])[:, None],
                no_log_probs.expand(len(share), -1),
            )
            for share in shares
        ]
        return replace(self, scale=len(filled) / len(pairs)), batches

    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        """The loss of the pairs of a micro-batch at the noise levels of step `index`, with gradients."""
        rows, samples = trajectory.prompt_rows, trajectory.sample_index
        gain, distance = self.gains(trajectory, index, samples[::2].repeat_interleave(2))
        winner, loser, row = samples[::2], samples[1::2], rows[::2]
        column = (self.pairs.winner[row] == winner[:, None]).int().argmax(dim=1)
        probability = self.pairs.probability[row, column].masked_fill(winner == loser, torch.nan)
        pairs = gain.unflatten(0, (-1, 2))
        found = dpo_loss(pairs, probability.to(gain), self.config.loss.dpo_beta, self.scale)
        return Loss(found.value, {**found.metrics, "preference/reference_distance": distance.mean()})


def final_latents(trajectories: Sequence[Trajectory], wanted: Collection[Sample], mesh: Mesh) -> dict[Sample, Tensor]:
    """The final latents of samples of any rank, kept where trajectories are. Collective.

    One micro-batch of each rank is exchanged at a time, so that a rank never holds all videos of a step.
    """
    found: dict[Sample, Tensor] = {}
    for trajectory in trajectories:
        size, device = len(trajectory), trajectory.latents.device
        places, count = range(mesh.data_rank * size, (mesh.data_rank + 1) * size), mesh.data_size * size
        own = torch.stack([trajectory.prompt_rows, trajectory.sample_index], dim=1)
        samples = mesh.gather(own.to(mesh.device), places, count).tolist()
        latents = mesh.gather(trajectory.latents[:, -1].to(mesh.device), places, count)
        for place, (row, sample) in enumerate(samples):
            if (row, sample) in wanted:
                found[row, sample] = latents[place].to(device, copy=True)
    return found
