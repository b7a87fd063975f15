"""Sampling of a rank's share of videos, as recorded trajectories."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch

from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.conditioning import guidance_of, rows_of
from bpgo_video.rollouts.denoiser import Denoiser
from bpgo_video.rollouts.rules import TrainedSteps, no_steps
from bpgo_video.types import Latents, PromptBatch, RolloutChunk, Trajectory


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
    """Sample this rank's share of `group_size` videos per prompt, one chunk at a time so that scoring can overlap.

    The ranks of a sequence group sample the same trajectories together, and each decodes a part of their videos. Noise
    is keyed by (*key, prompt id, sample, denoising step).

    Args:
        trained_steps: the stochastic steps of a prompt's samples; the same for all prompts of a micro-batch.
        same_start: all samples of a prompt start from the noise of sample 0.
    """
    shares = mesh.share(len(prompts) * group_size, micro_batch_size)
    per_chunk = mesh.sequence // gcd(mesh.sequence, micro_batch_size)  # a chunk's videos divide over a sequence group
    for first in range(0, len(shares), per_chunk):
        trajectories = []
        for items in shares[first : first + per_chunk]:
            rows, samples = torch.tensor(items) // group_size, torch.tensor(items) % group_size
            sample_keys = list(zip(prompts.ids[rows].tolist(), samples.tolist(), strict=True))

            def noise_of(step: int | str, keys: list[tuple[int, int]] = sample_keys) -> Latents:
                return keyed_noise(latent_shape, [(*key, *own, step) for own in keys], mesh.device)

            guidance = guidance_of(prompts, rows, mesh.device)
            noise = noise_of("start", [(prompt, 0) for prompt, _ in sample_keys]) if same_start else noise_of("start")
            start = denoiser.policy.start(noise, guidance.towards)
            steps = trained_steps(sample_keys[0][0])
            trajectories.append(Trajectory(rows, samples, steps, *denoiser.denoise(start, guidance, noise_of, steps)))
        yield _decoded(denoiser.policy, tuple(trajectories), prompts, mesh)


def _decoded(policy: Policy, trajectories: tuple[Trajectory, ...], prompts: PromptBatch, mesh: Mesh) -> RolloutChunk:
    """The trajectories with those of their videos that this rank of the sequence group decodes."""
    latents = torch.cat([trajectory.latents[:, -1] for trajectory in trajectories])
    rows = torch.cat([trajectory.prompt_rows for trajectory in trajectories])
    samples = torch.cat([trajectory.sample_index for trajectory in trajectories])
    mine = mesh.part(len(latents))
    conditioning = rows_of(prompts.conditioning, rows[mine], mesh.device)
    return RolloutChunk(trajectories, policy.decode(latents[mine].float(), conditioning), rows[mine], samples[mine])
