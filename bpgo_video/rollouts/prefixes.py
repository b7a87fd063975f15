"""Prefixes: what the samples of a prompt have in common is computed once.

With `rollout.same_start` all samples of a prompt are equal until its first stochastic step. A rank denoises its prompts
until there, in batches of up to a micro-batch's size, and its micro-batches branch off.

All ranks run the same forwards in the same order, as sharded weights require (ZeRO-3), also those of two transformers:
the n-th micro-batches of all ranks branch off together, at the smallest first stochastic step of their prompts, and the
n-th prefixes end together. Rollouts with gathered weights follow the same rule: a batch's shape determines the bits of
its samples, which must not depend on the free memory, by which `rollout.parameters: auto` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from more_itertools import chunked
from torch import Tensor

from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rollouts.denoiser import Denoiser, PartialPath, joined
from bpgo_video.types import Guidance

Rows = Int[Tensor, "samples"]  # of prompts
Guide = Callable[[Rows], Guidance]
Begin = Callable[[Rows, Int[Tensor, "samples"], Guidance], PartialPath]  # rows, numbers of samples -> their noise
Prefixes = dict[tuple[int, int], PartialPath]  # (row, step) -> the common path of the prompt's samples to the step


@dataclass(frozen=True)
class Branches:
    """Where the micro-batches of a rollout branch off.

    Attributes:
        batches: rows of the prompts of each of this rank's prefixes, which are computed as a batch.
        ends: step at which each prefix ends, the same on every rank.
        steps: step at which each micro-batch branches off, the same on every rank.
    """

    batches: list[list[int]]
    ends: list[int]
    steps: list[int]


def branches(first_steps: Sequence[int], mesh: Mesh, group_size: int, micro_batch_size: int) -> Branches:
    """The branches of `group_size` samples per prompt, distributed over ranks by `Mesh.share`.

    Args:
        first_steps: each prompt's first stochastic step; the number of steps if it has none.
    """
    shares = rows_of_ranks(len(first_steps), mesh, group_size, micro_batch_size)
    steps = [min(first_steps[row] for rows in together for row in rows) for together in zip(*shares, strict=True)]
    batches = [prefix_batches(share, micro_batch_size) for share in shares]
    ends = [0] * max(map(len, batches))
    for share, of_rank in zip(shares, batches, strict=True):
        for number, rows in enumerate(of_rank):
            reached = [step for step, needed in zip(steps, share, strict=True) if set(needed) & set(rows)]
            ends[number] = max(ends[number], *reached)
    if sum(ends) > sum(steps):  # ranks divide their prompts so differently that prefixes cost more than they save
        return branches([min(first_steps)] * len(first_steps), mesh, group_size, micro_batch_size)
    mine = batches[mesh.data_rank]
    return Branches(mine + mine[-1:] * (len(ends) - len(mine)), ends, steps)  # to run as many forwards as other ranks


def rows_of_ranks(prompts: int, mesh: Mesh, group_size: int, micro_batch_size: int) -> list[list[list[int]]]:
    """The prompt of each sample of each micro-batch of each data-parallel rank."""
    ranks = [replace(mesh, rank=rank) for rank in range(0, mesh.world_size, mesh.sequence)]
    shares = [rank.share(prompts * group_size, micro_batch_size) for rank in ranks]
    return [[[item // group_size for item in items] for items in share] for share in shares]


def prefix_batches(share: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """The distinct prompts of a rank's micro-batches, in order, in batches of up to `size`."""
    return list(chunked(dict.fromkeys(row for rows in share for row in rows), size))


@torch.no_grad()
def compute_prefixes(denoiser: Denoiser, planned: Branches, guide: Guide, begin: Begin) -> Prefixes:
    """The prefixes of this rank's prompts, at each step at which a micro-batch branches off.

    Raises:
        ValueError: the denoiser's scheduler takes the steps; what it remembers of a batch cannot be divided.
    """
    if denoiser.scheduler is not None:
        raise ValueError("samples of one start need a solver of bpgo_video.diffusion.sde, not a diffusers scheduler")
    prefixes = Prefixes()
    for prompts, end in zip(planned.batches, planned.ends, strict=True):
        rows = torch.tensor(prompts)
        guidance = guide(rows)
        path = begin(rows, torch.zeros_like(rows), guidance)
        for step in range(end + 1):
            if step in planned.steps:
                prefixes |= {(row, step): path.sample(position) for position, row in enumerate(prompts)}
            if step < end:
                path = denoiser.follow_ode(path, guidance)
    return prefixes


def branched_off(prefixes: Prefixes, rows: Rows, step: int) -> PartialPath:
    """The samples of a micro-batch at the step at which it branches off; `rows` are their prompts."""
    return joined([prefixes[row, step] for row in rows.tolist()])
