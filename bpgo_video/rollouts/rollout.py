"""Sampling of a rank's share of videos, as recorded trajectories."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import ceil, gcd

import torch
from more_itertools import chunked
from torch import Tensor

from bpgo_video.config.bpgo import RolloutConfig
from bpgo_video.config.branching import leaves_below, samples_together
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.conditioning import guidance_of, rows_of
from bpgo_video.rollouts.denoiser import Denoiser
from bpgo_video.rollouts.paths import PartialPath
from bpgo_video.rollouts.prefixes import (
    Prefixes,
    branched_off,
    branches,
    compute_prefixes,
    exchanged,
    micro_batches,
    spreads,
)
from bpgo_video.rollouts.rules import TrainedSteps, no_steps
from bpgo_video.rollouts.tree import Tree
from bpgo_video.types import Guidance, Latents, PromptBatch, RolloutChunk, Trajectory


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
    branching: tuple[int, ...] = (),
) -> Iterator[RolloutChunk]:
    """Sample this rank's share of `group_size` videos per prompt, one chunk at a time so that scoring can overlap.

    The ranks of a sequence group sample the same trajectories together, and each decodes a part of their videos. Noise
    is keyed by (*key, prompt id, sample, denoising step).

    Args:
        trained_steps: the stochastic steps of a prompt's samples; the same for all prompts of a micro-batch.
        same_start: all samples of a prompt start from the noise of sample 0, and share what precedes their first
            stochastic step.
        branching: children of each node at the first, second ... stochastic step, with `same_start`; see `Tree`. Noise
            is that of the first sample below a child.
    """
    guide = partial(guidance_of, prompts, device=mesh.device)
    stochastic = [trained_steps(prompt) for prompt in prompts.ids.tolist()]

    def noise_of(rows: Tensor, samples: Tensor, step: int | str) -> Latents:
        keys = zip(prompts.ids[rows].tolist(), samples.tolist(), strict=True)
        return keyed_noise(latent_shape, [(*key, *own, step) for own in keys], mesh.device)

    def noise_of_children(tree: Tree, rows: Tensor, samples: Tensor, steps: tuple[int, ...], step: int) -> Latents:
        depth = steps.index(step) + 1
        each, first = slice(None, None, tree.stride(depth)), samples - samples % leaves_below(branching, depth)
        return noise_of(rows[each], first[each], step)

    def begin(rows: Tensor, samples: Tensor, guidance: Guidance) -> PartialPath:
        return denoiser.begin(denoiser.policy.start(noise_of(rows, samples, "start"), guidance.towards))

    # A rank encodes the images and videos of its own samples only, so with them it has all samples of few prompts.
    alone = prompts.images is not None or prompts.videos is not None
    spread = same_start and not branching and not alone and spreads(mesh, group_size, micro_batch_size)
    size = samples_together(branching, len(prompts), group_size, micro_batch_size, mesh.data_size)
    shares = micro_batches(mesh, len(prompts), group_size, size, spread)
    branch_steps, prefixes = [0] * len(shares), Prefixes()
    if same_start:
        first_steps = [min(steps, default=len(denoiser.steps)) for steps in stochastic]
        planned = branches(first_steps, mesh, group_size, size, spread=spread, at_once=micro_batch_size)
        branch_steps, prefixes = planned.steps, compute_prefixes(denoiser, planned, guide, begin)
        prefixes = exchanged(prefixes, mesh) if spread else prefixes
    for chunk in chunked(zip(shares, branch_steps, strict=True), _per_chunk(mesh, size)):
        trajectories = []
        for items, branch_step in chunk:
            rows, samples = torch.tensor(items) // group_size, torch.tensor(items) % group_size
            guidance, steps = guide(rows), stochastic[int(rows[0])]
            tree = Tree(len(items), branching, micro_batch_size)
            roots = rows[:: tree.stride(0)]
            path = branched_off(prefixes, roots, branch_step) if same_start else begin(rows, samples, guidance)
            noise = partial(noise_of_children, tree, rows, samples, steps)
            denoised = denoiser.complete(path, guidance, noise, steps, tree)
            trajectories.append(Trajectory(rows, samples, steps, *denoised))
        yield from _decoded(denoiser.policy, tuple(trajectories), prompts, mesh, micro_batch_size)


def chunks_of_rank(rollout: RolloutConfig, mesh: Mesh) -> int:
    """How many chunks a rank samples in a training step."""
    micro_batches = rollout.prompts_per_step * rollout.group_size // mesh.data_size // rollout.micro_batch_size
    return ceil(micro_batches / _per_chunk(mesh, rollout.micro_batch_size))


def _per_chunk(mesh: Mesh, micro_batch_size: int) -> int:
    """Micro-batches of a chunk, whose videos divide over a sequence group."""
    return mesh.sequence // gcd(mesh.sequence, micro_batch_size)


def _decoded(
    policy: Policy, trajectories: tuple[Trajectory, ...], prompts: PromptBatch, mesh: Mesh, micro_batch_size: int
) -> Iterator[RolloutChunk]:
    """The trajectories, with the first of their videos, then the others; as many of them as a chunk has.

    This rank decodes its part of those of the sequence group.
    """
    latents = torch.cat([trajectory.latents[:, -1] for trajectory in trajectories])
    rows = torch.cat([trajectory.prompt_rows for trajectory in trajectories])
    samples = torch.cat([trajectory.sample_index for trajectory in trajectories])
    for videos in torch.arange(len(latents)).split(_per_chunk(mesh, micro_batch_size) * micro_batch_size):
        mine = videos[mesh.part(len(videos))]
        conditioning = rows_of(prompts.conditioning, rows[mine], mesh.device)
        clean = latents[mine].float()
        decoded, audio = policy.decode(clean, conditioning), policy.decode_audio(clean, conditioning)
        yield RolloutChunk(trajectories, decoded, rows[mine], samples[mine], audio)
        trajectories = ()
