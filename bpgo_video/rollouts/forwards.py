"""How many forwards a rollout and its replay take."""

from __future__ import annotations

from math import prod

import torch

from bpgo_video.config.bpgo import Config
from bpgo_video.config.branching import samples_together
from bpgo_video.diffusion.steps import split_updates, trained_before
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rollouts.prefixes import prefix_batches, rows_of_ranks, spreads
from bpgo_video.rollouts.tree import Tree

DRAWN = ("random", "random_window")  # selections of trained steps


def expected_forwards(config: Config, data_size: int) -> float:
    """Forwards that a rank runs in a rollout, expected over the draws of trained steps; 1 is a micro-batch's forward.

    The forwards of a prefix (`rollout.same_start`) and of the nodes of a tree (`rollout.branches`) count by their
    samples. The expectation is exact if all steps but the last can be trained, micro-batches of two positions have the
    same prompts or none in common, and prompts have no images.

    Args:
        data_size: data-parallel ranks.
    """
    rollout, num_steps, size = config.rollout, config.sampler.num_steps, config.rollout.micro_batch_size
    mesh = Mesh(0, data_size, torch.device("cpu"))
    spread = rollout.same_start and not rollout.branches and spreads(mesh, rollout.group_size, size)
    tree = tree_of(config, data_size)
    shares = rows_of_ranks(rollout.prompts_per_step, mesh, rollout.group_size, tree.samples, spread)
    before = [_trained_before(config, step) for step in range(num_steps + 1)]
    shared = sum(p * (tree.samples - nodes(tree, depth)) for of_step in before[:-1] for depth, p in enumerate(of_step))
    forwards = len(shares[0]) * (num_steps * tree.samples - shared) / size
    if not rollout.same_start:
        return forwards
    precedes = [of_step[0] for of_step in before[1:]]
    own = config.sampler.share_steps == "group" and config.sampler.train_steps in DRAWN
    # A micro-batch branches off at the smallest of independent first steps: one of each prompt, or one of all.
    draws = [
        frozenset(row if own else 0 for rows in together for row in rows) for together in zip(*shares, strict=True)
    ]
    forwards -= sum(probability ** len(rows) for rows in draws for probability in precedes) * nodes(tree, 0) / size
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


def expected_replays(config: Config, data_size: int) -> list[float]:
    """Forwards with a backward of each update of a rank, in micro-batches: of the nodes before each trained step."""
    rollout, tree = config.rollout, tree_of(config, data_size)
    trees = rollout.prompts_per_step * rollout.group_size / data_size / tree.samples
    steps = config.loss.draft_steps if config.loss.objective == "draft" else config.sampler.trained_count
    updates = split_updates(range(steps), config.optim.updates_per_rollout)
    return [trees * sum(nodes(tree, depth) for depth in depths) / rollout.micro_batch_size for depths in updates]


def tree_of(config: Config, data_size: int) -> Tree:
    """What each rank denoises together."""
    rollout, branches = config.rollout, config.rollout.branches
    sizes = (rollout.prompts_per_step, rollout.group_size, rollout.micro_batch_size)
    return Tree(samples_together(branches, *sizes, data_size), branches)


def nodes(tree: Tree, depth: int) -> int:
    """Nodes before trained step `depth`."""
    return tree.samples // tree.stride(depth)


def _trained_before(config: Config, step: int) -> list[float]:
    """The probabilities of 0, 1, 2 ... trained steps before a step, averaged over a moving window's places."""
    sampler, every = config.sampler, config.sampler.window_every
    moves = range(-(-config.run.num_steps // every)) if sampler.train_steps == "window" and every else range(1)
    places = [sampler.window_start + move for move in moves]
    counts = (sampler.num_steps, sampler.trained_count)
    found = [trained_before(sampler.train_steps, *counts, place, step) for place in places]
    return [sum(of_count) / len(places) for of_count in zip(*found, strict=True)]
