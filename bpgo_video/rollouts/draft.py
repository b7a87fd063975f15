"""The objective `draft`: the gradient of the rewards, through the decoded frames and the last denoising steps.

DRaFT-K (arXiv 2309.17400): the loss is minus the weighted sum of the rewards, and its gradient goes through the last K
steps of the ODE; the latents before them are constants. K = 1 is close to ReFL (arXiv 2304.05977), which scores the
prediction of a random late step instead.

The chain rule is applied step by step, from data to noise, at the latents that the rollout recorded:

    g_T = d(-R)/d x_T       the passes k = T-1, ..., T-K each differentiate <g_{k+1}, x_k + v(x_k) dt>:
                            the gradient in the weights is added up, that in the latents is g_k

So one step's activations exist at a time, as with a checkpoint for each step, and a pass uses each weight once: ZeRO-3
cannot reduce the gradients of a weight that one graph uses several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bpgo_video.diffusion.sde import euler
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rollouts.conditioning import guidance_of, rows_of
from bpgo_video.rollouts.updates import Objective
from bpgo_video.types import Latents, Loss, RolloutChunk, Trajectory


@dataclass(frozen=True)
class DifferentiatedRewards(Objective):
    """-sum_r weight_r R_r of the rollout's videos, the mean over samples.

    Attributes:
        batches: micro-batches of the update.
        later: latents of the last pass, whose gradient its backward leaves, and its micro-batch's reward.
    """

    batches: int = 1
    later: list[tuple[Latents, Tensor]] = field(default_factory=list)

    def arranged(
        self, trajectories: Sequence[Trajectory], mesh: Mesh
    ) -> tuple[DifferentiatedRewards, Sequence[Trajectory]]:
        return replace(self, batches=len(trajectories)), trajectories

    def passes(self, trajectory: Trajectory) -> Sequence[int]:
        """The last K steps, the last one first."""
        steps = len(self.denoiser.steps)
        return range(steps - 1, steps - 1 - self.config.loss.draft_steps, -1)

    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        """The micro-batch's loss, with the gradient that goes through step `index`; the backward of the pass before it
        must have run.

        Its backward is expected to be scaled by 1/(batches x K), as `optimise` does.
        """
        if index == len(self.denoiser.steps) - 1:
            gradient, reward = self.gradient_of_pixels(trajectory)
        else:
            ((reached, reward),) = self.later
            assert reached.grad is not None
            gradient = self.batches * reached.grad
        latents = trajectory.latents[:, index].to(self.device, torch.float32).detach().requires_grad_()
        guidance = guidance_of(self.prompts, trajectory.prompt_rows, self.device)
        velocity = self.denoiser.velocity(latents, index, guidance)
        following = euler(velocity, latents, self.denoiser.steps[index], None)
        slope = self.config.loss.draft_steps * (gradient * following).sum()
        self.later[:] = [(latents, reward)]
        return Loss(slope - slope.detach() - reward, {"draft/reward": reward})

    def gradient_of_pixels(self, trajectory: Trajectory) -> tuple[Latents, Float[Tensor, ""]]:
        """The gradient of minus the mean reward in the final latents, and the mean reward.

        Videos are decoded one at a time and once more in backward: of the VAE's activations, those of one video exist.
        """
        assert self.suite is not None
        rows, samples = trajectory.prompt_rows, trajectory.sample_index
        latents = trajectory.latents[:, -1].to(self.device, torch.float32).detach().requires_grad_()
        conditioning = rows_of(self.prompts.conditioning, rows, self.device)
        pixels = [
            checkpoint(
                self.policy.pixels,
                latents[[row]],
                {name: value[[row]] for name, value in conditioning.items()},
                use_reentrant=False,
            )
            for row in range(len(latents))
        ]
        audio = self.policy.decode_audio(latents.detach(), conditioning)  # without a gradient
        reward = self.suite.total(RolloutChunk((), torch.cat(pixels), rows, samples, audio), self.prompts).mean()
        (gradient,) = torch.autograd.grad(-reward, latents)
        return gradient, reward.detach()
