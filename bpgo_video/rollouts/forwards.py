"""How many forwards a rollout takes."""

from __future__ import annotations

from math import prod

import torch

from bpgo_video.config.bpgo import Config
from bpgo_video.diffusion.steps import precedes_trained
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rollouts.prefixes import prefix_batches, rows_of_ranks, spreads

DRAWN = ("random", "random_window")  # selections of trained steps


def expected_forwards(config: Config, data_size: int) -> float:
    """Forwards that a rank runs in a rollout, expected over the draws of trained steps; 1 is a micro-batch's forward.

    With `rollout.same_start` the forwards of a prefix count by its samples. The expectation is exact if all steps but
    the last can be trained, micro-batches of two positions have the same prompts or none in common, and prompts have no
    images.

    Args:
        data_size: data-parallel ranks.
    """
    rollout, num_steps, size = config.rollout, config.sampler.num_steps, config.rollout.micro_batch_size
    mesh = Mesh(0, data_size, torch.device("cpu"))
    spread = rollout.same_start and spreads(mesh, rollout.group_size, size)
    shares = rows_of_ranks(rollout.prompts_per_step, mesh, rollout.group_size, size, spread)
    forwards = float(len(shares[0]) * num_steps)
    if not rollout.same_start:
        return forwards
    precedes = [_precedes(config, step) for step in range(num_steps)]
    own = config.sampler.share_steps == "group" and config.sampler.train_steps in DRAWN
    # A micro-batch branches off at the smallest of independent first steps: one of each prompt, or one of all.
    draws = [
        frozenset(row if own else 0 for rows in together for row in rows) for together in zip(*shares, strict=True)
    ]
    forwards -= sum(probability ** len(rows) for rows in draws for probability in precedes)
    batches = prefix_batches(shares, size, spread)
    for number in range(max(map(len, batches))):
        reaching = {
            rows
            for share, of_rank in zip(shares, batches, strict=True)
            for batch in of_rank[number : number + 1]
            for needed, rows in zip(share, draws, strict=True)
            if set(needed) & set(batch)
        }
        end = sum(1 - prod(1 - probability ** len(rows) for rows in reaching) for probability in precedes)
        samples = sum(len(of_rank[min(number, len(of_rank) - 1)]) for of_rank in batches)  # ranks repeat their last
        forwards += end * samples / (data_size * size)
    return forwards


def _precedes(config: Config, step: int) -> float:
    """The probability that a denoising step precedes the first trained one, averaged over a moving window's places."""
    sampler, every = config.sampler, config.sampler.window_every
    moves = range(-(-config.run.num_steps // every)) if sampler.train_steps == "window" and every else range(1)
    places = [sampler.window_start + move for move in moves]
    counts = (sampler.num_steps, sampler.trained_count)
    return sum(precedes_trained(sampler.train_steps, *counts, place, step) for place in places) / len(places)
