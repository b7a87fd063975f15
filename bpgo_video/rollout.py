"""How are videos sampled, and what is recorded of it? The denoising loop, with guidance, for rollout and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from bpgo_video import sde
from bpgo_video.config import Config
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.policies import Policy, guided_velocity
from bpgo_video.randomness import generator_of, keyed_noise
from bpgo_video.steps import STEP_SELECTIONS
from bpgo_video.types import Conditioning, Latents, PromptBatch, RolloutChunk, Trajectory

LATENTS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Denoiser:
    """One rule for a denoising step, the same function in rollout and replay.

    Attributes:
        sigmas: noise levels of the whole schedule.
        trained_steps: these are stochastic and follow `sampler`; the others follow the ODE.
        latents_dtype: latents are rounded to it after each step, before a log-prob is taken.
    """

    policy: Policy
    sigmas: Tensor
    trained_steps: tuple[int, ...]
    sampler: str
    eta: float
    guidance_scale: float
    latents_dtype: torch.dtype

    def transition(
        self, latents: Latents, index: int, conditioning: Conditioning, negative: Conditioning
    ) -> sde.Transition:
        """Where step `index` leads from `latents`; differentiable in the policy's parameters."""
        step = sde.steps_of(self.sigmas)[index]
        sigma = self.sigmas[index].to(latents.device)
        latents = latents.float()
        velocity = guided_velocity(self.policy, latents, sigma, conditioning, negative, self.guidance_scale)
        sampler = sde.SAMPLERS[self.sampler if index in self.trained_steps else "ode"]
        return sampler(velocity, latents, step, self.eta)

    @torch.no_grad()
    def denoise(
        self,
        latents: Latents,
        conditioning: Conditioning,
        negative: Conditioning,
        noise_of: Callable[[int], Latents],
    ) -> tuple[Tensor, Tensor]:
        """From noise to data: the path [samples, steps + 1, ...] and its log-probs [samples, steps].

        Args:
            noise_of: standard normal noise of a stochastic step, by the step's index.
        """
        path = [latents.to(self.latents_dtype)]
        num_steps = len(self.sigmas) - 1
        log_probs = torch.full((latents.shape[0], num_steps), torch.nan, device=latents.device)
        for index in range(num_steps):
            transition = self.transition(path[-1], index, conditioning, negative)
            if transition.is_deterministic:
                path.append(transition.mean.to(self.latents_dtype))
                continue
            path.append(transition.sample(noise_of(index)).to(self.latents_dtype))
            log_probs[:, index] = transition.log_prob(path[-1])
        return torch.stack(path, dim=1), log_probs


def training_denoiser(policy: Policy, config: Config, step: int) -> Denoiser:
    """The denoiser of a training step: which steps it trains is drawn by (seed, step)."""
    sampler = config.sampler
    select = STEP_SELECTIONS[sampler.train_steps]
    generator = generator_of(config.run.seed, "trained steps", step)
    return Denoiser(
        policy=policy,
        sigmas=policy.sigmas(sampler.num_steps, sampler.shift),
        trained_steps=select(sampler.num_steps, sampler.train_fraction, generator),
        sampler=sampler.name,
        eta=sampler.eta,
        guidance_scale=sampler.guidance_scale,
        latents_dtype=LATENTS_DTYPES[sampler.latents_dtype],
    )


def rows_of(conditioning: Conditioning, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The conditioning of each sample, from that of the prompts, which rests on the CPU."""
    return {name: value[rows].to(device, non_blocking=True) for name, value in conditioning.items()}


def sample_chunks(
    denoiser: Denoiser,
    prompts: PromptBatch,
    negative: Conditioning,
    mesh: Mesh,
    *,
    group_size: int,
    micro_batch_size: int,
    latent_shape: tuple[int, int, int, int],
    key: tuple[int | str, ...],
    same_start: bool = False,
) -> Iterator[RolloutChunk]:
    """This rank's samples of `group_size` videos per prompt, a micro-batch at a time, so that scoring can start.

    The ranks of a sequence group make the same trajectories together and decode different ones of their videos.

    Every draw is keyed by (*key, prompt id, sample, denoising step).

    Args:
        same_start: the samples of a prompt start from the same noise, that of sample 0.
    """
    shares = mesh.share(len(prompts) * group_size, micro_batch_size)
    together = mesh.sequence // gcd(mesh.sequence, micro_batch_size)  # so that a group's videos divide over its ranks
    for first in range(0, len(shares), together):
        trajectories = []
        for items in shares[first : first + together]:
            rows = torch.tensor(items) // group_size
            samples = torch.tensor(items) % group_size
            owners = list(zip(prompts.ids[rows].tolist(), samples.tolist(), strict=True))

            def noise_of(step: int | str, owners: list[tuple[int, int]] = owners) -> Latents:
                return keyed_noise(latent_shape, [(*key, *owner, step) for owner in owners], mesh.device)

            conditioning = rows_of(prompts.conditioning, rows, mesh.device)
            start = noise_of("start", [(prompt, 0) for prompt, _ in owners]) if same_start else noise_of("start")
            path, log_probs = denoiser.denoise(start, conditioning, negative, noise_of)
            trajectories.append(Trajectory(rows, samples, path, log_probs))
        yield _decoded(denoiser.policy, tuple(trajectories), mesh)


def _decoded(policy: Policy, trajectories: tuple[Trajectory, ...], mesh: Mesh) -> RolloutChunk:
    """The trajectories with those of their videos that fall to this rank of its sequence group."""
    latents = torch.cat([trajectory.latents[:, -1] for trajectory in trajectories])
    mine = mesh.part(len(latents))
    rows = torch.cat([trajectory.prompt_rows for trajectory in trajectories])
    samples = torch.cat([trajectory.sample_index for trajectory in trajectories])
    return RolloutChunk(trajectories, policy.decode(latents[mine].float()), rows[mine], samples[mine])
