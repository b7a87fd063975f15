"""The denoising loop, with guidance, for rollout and evaluation, and what it records."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import gcd

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.config.bpgo import Config
from bpgo_video.diffusion import sde
from bpgo_video.diffusion.steps import STEP_SELECTIONS
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy, guided_velocity
from bpgo_video.randomness import generator_of, keyed_noise
from bpgo_video.rollouts.experts import trainable_steps
from bpgo_video.types import Conditioning, Guidance, Latents, PromptBatch, RolloutChunk, Trajectory, Velocity

TrainedSteps = Callable[[int], tuple[int, ...]]  # prompt id -> indices of its stochastic steps

LATENTS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Denoiser:
    """One rule for a denoising step, the same function in rollout and replay.

    Attributes:
        sigmas: noise levels of the whole schedule.
        sampler: transition of the stochastic steps; the others follow the ODE by `solver`.
        guidance_scale_2: of a pipeline's second transformer; None takes the first one's.
        latents_dtype: latents are rounded to it after each step, before a log-prob is taken.
        records_means: keep the mean of each stochastic transition, for trust regions that compare it.
        records_path: keep the latents of every noise level, not of the last alone.
        records_frames: keep the log-probs of each latent frame, for credit by frames.
    """

    policy: Policy
    sigmas: Tensor
    sampler: str
    eta: float
    guidance_scale: float
    latents_dtype: torch.dtype
    solver: str = "euler"
    records_means: bool = False
    records_path: bool = True
    records_frames: bool = False
    guidance_scale_2: float | None = None

    @cached_property
    def steps(self) -> list[sde.Step]:
        return sde.steps_of(self.sigmas)

    def velocity(self, latents: Latents, index: int, guidance: Guidance) -> Velocity:
        """At the start of step `index`, guided; differentiable in the policy's parameters."""
        return guided_velocity(self.policy, latents.float(), self.sigmas[index], guidance, self.guidance_at(index))

    def guidance_at(self, index: int) -> float:
        """The scale of the transformer that computes step `index`."""
        is_first = self.policy.transformer_at(float(self.sigmas[index])) == self.policy.transformer_names[0]
        return self.guidance_scale if self.guidance_scale_2 is None or is_first else self.guidance_scale_2

    def transition(self, latents: Latents, index: int, guidance: Guidance) -> sde.Transition:
        """Where the stochastic step `index` leads from `latents`; differentiable in the policy's parameters."""
        return self.transition_of(self.velocity(latents, index, guidance), latents, index)

    def transition_of(self, velocity: Velocity, latents: Latents, index: int) -> sde.Transition:
        """Where the stochastic step `index` leads with this velocity."""
        return sde.transition(self.sampler, velocity, latents.float(), self.steps[index], self.eta)

    @torch.no_grad()
    def denoise(
        self,
        latents: Latents,
        guidance: Guidance,
        noise_of: Callable[[int], Latents],
        trained_steps: Collection[int] = (),
    ) -> Path:
        """From noise to data.

        Args:
            noise_of: standard normal noise of a stochastic step, by the step's index.
            trained_steps: these are stochastic; their log-probs are recorded.
        """
        point, means, steps = latents.to(self.latents_dtype), [], self.steps
        points = [point]
        log_probs = torch.full((latents.shape[0], len(steps)), torch.nan, device=latents.device)
        by_frame = log_probs[:, :, None].repeat(1, 1, latents.shape[2]) if self.records_frames else None
        before: sde.OdeStep | None = None  # of the step before, where that one followed the ODE too
        for index, step in enumerate(steps):
            if index in trained_steps:
                transition = self.transition(point, index, guidance)
                point = transition.sample(noise_of(index)).to(self.latents_dtype)
                log_probs[:, index] = transition.log_prob(point)
                if by_frame is not None:
                    by_frame[:, index] = transition.frame_log_prob(point)
                means += [transition.mean] if self.records_means else []
                before = None
            else:
                slope = sde.OdeStep(self.velocity(point, index, guidance), step)
                point = sde.SOLVERS[self.solver](slope, before, point.float()).to(self.latents_dtype)
                before = slope
            points = [*points, point] if self.records_path else [point]
        return Path(torch.stack(points, dim=1), log_probs, torch.stack(means, dim=1) if means else None, by_frame)


@dataclass(frozen=True)
class Path:
    """Latents at every noise level (or the last); of the stochastic steps log-probs (nan elsewhere) and their means."""

    latents: Float[Tensor, "samples points channels latent_frames latent_height latent_width"]
    log_probs: Float[Tensor, "samples steps"]
    means: Float[Tensor, "samples trained channels latent_frames latent_height latent_width"] | None
    frame_log_probs: Float[Tensor, "samples steps latent_frames"] | None = None


def training_denoiser(policy: Policy, config: Config) -> Denoiser:
    """The denoiser of rollouts and their replay."""
    sampler = config.sampler
    return Denoiser(
        policy=policy,
        sigmas=policy.sigmas(sampler.num_steps, config.video, sampler.shift),
        sampler=sampler.name,
        eta=sampler.eta,
        guidance_scale=sampler.guidance_scale,
        latents_dtype=LATENTS_DTYPES[sampler.latents_dtype],
        solver=sampler.solver,
        records_means=config.loss.compares_means or pulls_to_previous(config),
        records_path=config.loss.objective == "policy_gradient",
        records_frames=config.credit.kind == "segment",
        guidance_scale_2=sampler.guidance_scale_2,
    )


def pulls_to_previous(config: Config) -> bool:
    """Whether the loss compares the policy with the one that sampled."""
    return config.loss.kl_weight > 0 and config.loss.kl_reference == "previous"


def trained_steps_of(policy: Policy, config: Config, step: int) -> TrainedSteps:
    """Which denoising steps training step `step` trains: drawn once for all prompts, or for each by its id.

    Below 0, before training, a moving window is where it starts.
    """
    sampler, seed, trainable = config.sampler, config.run.seed, trainable_steps(policy, config)
    start = sampler.window_start + (max(step, 0) // sampler.window_every if sampler.window_every else 0)

    def select(prompt: int) -> tuple[int, ...]:
        own = (prompt,) if sampler.share_steps == "group" else ()
        generator = generator_of(seed, "trained steps", step, *own)
        count = sampler.trained_of(len(trainable))
        places = STEP_SELECTIONS[sampler.train_steps](len(trainable) + 1, count, start, generator)
        return tuple(trainable[place] for place in places)

    return select


def sampled_steps(policy: Policy, config: Config, step: int) -> TrainedSteps:
    """The stochastic steps of a rollout: the trained ones, or none where only its final videos are learnt from."""
    return trained_steps_of(policy, config, step) if config.loss.objective == "policy_gradient" else no_steps


def guidance_of(prompts: PromptBatch, rows: Int[Tensor, "samples"], device: torch.device) -> Guidance:
    """What guides each sample, from what the prompts have, which rests on the CPU; `rows` are the samples' prompts."""
    away = torch.zeros_like(rows) if prompts.negative_rows is None else prompts.negative_rows[rows]
    return Guidance(rows_of(prompts.conditioning, rows, device), rows_of(prompts.negative, away, device))


def rows_of(conditioning: Conditioning, rows: Int[Tensor, "samples"], device: torch.device) -> dict[str, Tensor]:
    """Each distinct row goes to the device once: the samples of a group share their prompt's."""
    distinct, places = rows.unique(return_inverse=True)
    there = {name: value[distinct].to(device, non_blocking=True) for name, value in conditioning.items()}
    return {name: value[places.to(device)] for name, value in there.items()}


def no_steps(prompt: int) -> tuple[int, ...]:
    """Every step follows the ODE."""
    return ()


def sample_chunks(
    denoiser: Denoiser,
    prompts: PromptBatch,
    mesh: Mesh,
    *,
    group_size: int,
    micro_batch_size: int,
    latent_shape: tuple[int, int, int, int],
    key: tuple[int | str, ...],
    trained_steps: TrainedSteps = no_steps,
    same_start: bool = False,
) -> Iterator[RolloutChunk]:
    """This rank's samples of `group_size` videos per prompt, a micro-batch at a time, so that scoring can start.

    The ranks of a sequence group make the same trajectories together and decode different ones of their videos.

    Every draw is keyed by (*key, prompt id, sample, denoising step).

    Args:
        trained_steps: the stochastic steps of a prompt's samples; the same for all prompts of a micro-batch.
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

            guidance = guidance_of(prompts, rows, mesh.device)
            noise = noise_of("start", [(prompt, 0) for prompt, _ in owners]) if same_start else noise_of("start")
            start = denoiser.policy.start(noise, guidance.towards)
            chosen = trained_steps(owners[0][0])
            path = denoiser.denoise(start, guidance, noise_of, chosen)
            recorded = (path.latents, path.log_probs, path.means, path.frame_log_probs)
            trajectories.append(Trajectory(rows, samples, chosen, *recorded))
        yield _decoded(denoiser.policy, tuple(trajectories), prompts, mesh)


def _decoded(policy: Policy, trajectories: tuple[Trajectory, ...], prompts: PromptBatch, mesh: Mesh) -> RolloutChunk:
    """The trajectories with those of their videos that fall to this rank of its sequence group."""
    latents = torch.cat([trajectory.latents[:, -1] for trajectory in trajectories])
    mine = mesh.part(len(latents))
    rows = torch.cat([trajectory.prompt_rows for trajectory in trajectories])
    samples = torch.cat([trajectory.sample_index for trajectory in trajectories])
    conditioning = rows_of(prompts.conditioning, rows[mine], mesh.device)
    return RolloutChunk(trajectories, policy.decode(latents[mine].float(), conditioning), rows[mine], samples[mine])
