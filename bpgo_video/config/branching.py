"""Sizes of the trees of `rollout.branches`, and which settings go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd, prod

from bpgo_video.config.bpgo import Config


def leaves_below(branches: Sequence[int], depth: int) -> int:
    """Samples of a group that are equal until they split at trained step `depth`, counted from 0; 1 without branches.

    (4, 2): 8 before the first trained step, 2 before the second, 1 from then on.
    """
    return prod(branches[depth:])


def samples_together(
    branches: Sequence[int], prompts: int, group_size: int, micro_batch_size: int, data_size: int
) -> int:
    """Samples of a rank that are denoised together: a micro-batch's, or with branches all that a rank has of a tree.

    A rank has whole trees where the prompts divide over the data-parallel ranks, else equal parts of them.
    """
    if not branches:
        return micro_batch_size
    return max(micro_batch_size, gcd(group_size, prompts * group_size // data_size))


def branch_rules(config: Config) -> Mapping[str, object]:
    """What is wrong -> whether it is so; nothing without `rollout.branches`."""
    rollout, branches, trained = config.rollout, config.rollout.branches, config.sampler.trained_count
    if not branches:
        return {}
    shown, sizes = f"rollout.branches is {list(branches)}", sorted((rollout.group_size, rollout.micro_batch_size))
    return {
        f"{shown}, a tree of {prod(branches)} samples, with rollout.group_size = {rollout.group_size}; set one of them "
        "so that the product of branches is the group's size": prod(branches) != rollout.group_size,
        f"{shown} with rollout.same_start = false: a tree has one root; set rollout.same_start to true": (
            not rollout.same_start
        ),
        f"{shown}, splits at {len(branches)} trained steps, but sampler.train_steps and sampler.train_fraction train "
        f"{trained}; train more steps, or give fewer branches": len(branches) > trained,
        f"{shown} with rollout.micro_batch_size = {rollout.micro_batch_size}; set that to a divisor or a multiple of "
        f"rollout.group_size = {rollout.group_size}": sizes[1] % sizes[0],
        f"{shown} with advantage.best_of = {config.advantage.best_of}: a transition is replayed once for all samples "
        "below it, so that none can be left out; set advantage.best_of to null": config.advantage.best_of is not None,
        f"{shown} with credit.kind = {config.credit.kind!r}: frames of several samples share a transition; set "
        "credit.kind to 'video', or rollout.branches to []": config.credit.kind != "video",
    }


def branch_rules_of_ranks(config: Config, groups: int) -> Mapping[str, object]:
    """The same for a number of data-parallel ranks, on each of which equally many forwards must run."""
    rollout, sampler, branches = config.rollout, config.sampler, config.rollout.branches
    if not branches:
        return {}
    sizes = (rollout.prompts_per_step, rollout.group_size, rollout.micro_batch_size)
    together = samples_together(branches, *sizes, groups)
    uneven = [below for depth in range(len(branches)) if gcd(below := leaves_below(branches, depth), together) not in
              (below, together)]  # fmt: skip
    drawn = sampler.share_steps == "group" and sampler.train_steps in ("random", "random_window")
    return {
        f"rollout.branches is {list(branches)} on {groups} ranks (or sequence groups), each with parts of "
        f"{together} of the {rollout.group_size} samples of a prompt, across branches of {uneven}; set "
        f"rollout.prompts_per_step to a multiple of {groups}": bool(uneven),
        f"sampler.share_steps is 'group' with rollout.branches = {list(branches)} and rollout.micro_batch_size = "
        f"{rollout.micro_batch_size}: ranks whose prompts split at different steps would run different numbers of "
        f"forwards, and wait for each other forever; set share_steps to 'batch', or micro_batch_size to {together}": (
            groups > 1 and drawn and rollout.micro_batch_size < together
        ),
    }
