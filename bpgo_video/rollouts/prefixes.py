"""Prefixes: what the samples of a prompt have in common is computed once.

With `rollout.same_start` all samples of a prompt are equal until its first stochastic step. A rank denoises its prompts
until there, in batches of up to a micro-batch's size, and its micro-batches branch off.

Where groups divide over the ranks, each rank has samples of every prompt: `spread`. Each computes the prefixes of some
prompts, and all receive them. The n-th micro-batches of all ranks are then of one prompt, and branch off at its own
first stochastic step; with a prompt for each rank they would all branch off at the earliest.

All ranks run the same forwards in the same order, as sharded weights require (ZeRO-3), also those of two transformers:
the n-th micro-batches of all ranks branch off together, at the smallest first stochastic step of their prompts, and the
n-th prefixes end together. Rollouts with gathered weights follow the same rule: a batch's shape determines the bits of
its samples, which must not depend on the free memory, by which `rollout.parameters: auto` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from jaxtyping import Int
from more_itertools import chunked
from torch import Tensor

from bpgo_video.diffusion.sde import Step
from bpgo_video.distributed.mesh import Mesh, from_all
from bpgo_video.rollouts.denoiser import Denoiser
from bpgo_video.rollouts.paths import PartialPath, joined
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
        wanted: rows and steps at which micro-batches of this rank branch off.
    """

    batches: list[list[int]]
    ends: list[int]
    steps: list[int]
    wanted: frozenset[tuple[int, int]]


def spreads(mesh: Mesh, group_size: int, micro_batch_size: int) -> bool:
    """Whether each of several ranks can have equally many micro-batches of every prompt."""
    return mesh.data_size > 1 and group_size % (mesh.data_size * micro_batch_size) == 0


def micro_batches(mesh: Mesh, prompts: int, group_size: int, size: int, spread: bool) -> list[list[int]]:
    """This rank's items of prompts x group, in prompt-major order: its part of every group, or by `Mesh.share`."""
    if not spread:
        return mesh.share(prompts * group_size, size)
    each = group_size // mesh.data_size
    firsts = (row * group_size + mesh.data_rank * each for row in range(prompts))
    return [batch for first in firsts for batch in chunked(range(first, first + each), size)]


def branches(
    first_steps: Sequence[int],
    mesh: Mesh,
    group_size: int,
    micro_batch_size: int,
    *,
    spread: bool = False,
    at_once: int | None = None,
) -> Branches:
    """The branches of `group_size` samples per prompt, distributed over ranks by `micro_batches`.

    Args:
        first_steps: each prompt's first stochastic step; the number of steps if it has none.
        at_once: prompts of a prefix's batch, at most; None is a micro-batch's size.
    """
    shares = rows_of_ranks(len(first_steps), mesh, group_size, micro_batch_size, spread)
    steps = [min(first_steps[row] for rows in together for row in rows) for together in zip(*shares, strict=True)]
    batches = prefix_batches(shares, at_once or micro_batch_size, spread)
    ends = [0] * max(map(len, batches))
    for share, of_rank in zip(shares, batches, strict=True):
        for number, rows in enumerate(of_rank):
            reached = [step for step, needed in zip(steps, share, strict=True) if set(needed) & set(rows)]
            ends[number] = max(ends[number], *reached)
    if sum(ends) > sum(steps):  # ranks divide their prompts so differently that prefixes cost more than they save
        earliest = [min(first_steps)] * len(first_steps)
        return branches(earliest, mesh, group_size, micro_batch_size, spread=spread, at_once=at_once)
    mine = batches[mesh.data_rank]
    mine += mine[-1:] * (len(ends) - len(mine))  # to run as many forwards as other ranks
    wanted = {(row, step) for rows, step in zip(shares[mesh.data_rank], steps, strict=True) for row in rows}
    return Branches(mine, ends, steps, frozenset(wanted))


def rows_of_ranks(
    prompts: int, mesh: Mesh, group_size: int, micro_batch_size: int, spread: bool
) -> list[list[list[int]]]:
    """The prompt of each sample of each micro-batch of each data-parallel rank."""
    ranks = [replace(mesh, rank=rank) for rank in range(0, mesh.world_size, mesh.sequence)]
    shares = [micro_batches(rank, prompts, group_size, micro_batch_size, spread) for rank in ranks]
    return [[[item // group_size for item in items] for items in share] for share in shares]


def prefix_batches(shares: Sequence[Sequence[Sequence[int]]], size: int, spread: bool) -> list[list[list[int]]]:
    """The prompts whose prefixes each data-parallel rank computes, in batches of up to `size`.

    They are those of its micro-batches, or with `spread` its part of all prompts, at least one.
    """
    rows = [list(dict.fromkeys(row for rows in share for row in rows)) for share in shares]
    if spread:
        count = len(rows)
        rows = [every[rank::count] or [every[rank % len(every)]] for rank, every in enumerate(rows)]
    return [list(chunked(of_rank, size)) for of_rank in rows]


@torch.no_grad()
def compute_prefixes(denoiser: Denoiser, planned: Branches, guide: Guide, begin: Begin) -> Prefixes:
    """The prefixes of this rank's batches, at the steps at which its micro-batches branch off.

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
            reached = [(position, row) for position, row in enumerate(prompts) if (row, step) in planned.wanted]
            prefixes |= {(row, step): path.part(slice(position, position + 1)) for position, row in reached}
            if step < end:
                path = denoiser.follow_ode(path, guidance)
    return prefixes


def exchanged(prefixes: Prefixes, mesh: Mesh) -> Prefixes:
    """The prefixes that any rank computed, each from the first rank that has it. Collective."""
    mine = {place: _tensors_and_rest(path) for place, path in prefixes.items()}
    layouts = {place: ([(one.shape, one.dtype) for one in tensors], rest) for place, (tensors, rest) in mine.items()}
    by_rank = from_all(layouts, mesh)
    found = Prefixes()
    for place in sorted({place for of_rank in by_rank for place in of_rank}):
        source = next(rank for rank, of_rank in enumerate(by_rank) if place in of_rank)
        shapes, rest = by_rank[source][place]
        tensors = [torch.empty(shape, dtype=dtype, device=mesh.device) for shape, dtype in shapes]
        if mesh.rank == source:
            tensors = [tensor.contiguous() for tensor in mine[place][0]]
        for tensor in tensors:
            dist.broadcast(tensor, source)
        found[place] = _path_of(tensors, rest)
    return found


Rest = tuple[int, int, Step | None, int | None]  # number of points, step; ODE step before, step of the guidance


def _tensors_and_rest(path: PartialPath) -> tuple[list[Tensor], Rest]:
    known = [pair for pair in (path.previous, path.guided) if pair is not None]
    rest = (len(path.points), path.step, path.previous and path.previous[1], path.guided and path.guided[1])
    return [*path.points, *(pair[0] for pair in known)], rest


def _path_of(tensors: Sequence[Tensor], rest: Rest) -> PartialPath:
    """The inverse of `_tensors_and_rest`."""
    count, step, before, guided = rest
    others = iter(tensors[count:])
    previous = None if before is None else (next(others), before)
    return PartialPath(
        tuple(tensors[:count]), step, previous=previous, guided=None if guided is None else (next(others), guided)
    )


def branched_off(prefixes: Prefixes, rows: Rows, step: int) -> PartialPath:
    """The samples of a micro-batch at the step at which it branches off; `rows` are their prompts."""
    return joined([prefixes[row, step] for row in rows.tolist()])
