"""How `bpgo-video priors` samples the starting policy: which prompts, in which groups and rounds, and how many videos.

A prompt's samples are groups, each sampled as a group of training is: with its own draw of stochastic steps and, with
`rollout.same_start`, one start. Two samples are enough to measure the spread within a start, and more starts make the
mean over all samples more exact: pairs. Without `same_start` all samples of a prompt are one group.

The noise depends on the prompt and the group, not on the run's seed, so that runs of several seeds share their anchors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd, lcm

import numpy as np

from bpgo_video.config.bpgo import Config
from bpgo_video.data.priors import PriorError, PriorTable
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.stream import EndlessOrder
from bpgo_video.learner.priors import STORED
from bpgo_video.policies import Policy
from bpgo_video.rollouts.forwards import expected_forwards
from bpgo_video.rollouts.rules import TrainedSteps, sampled_steps

SEED = 0


def reads_priors(config: Config) -> bool:
    """Whether the run reads measured priors from the shards' folder."""
    return config.prior.kind in STORED and config.needs_prior


def prior_groups(config: Config) -> tuple[int, int]:
    """Groups of each prompt, and samples of a group."""
    return (config.prior.samples // 2, 2) if config.rollout.same_start else (1, config.prior.samples)


def positions_of(config: Config) -> range:
    """Positions of the endless order of prompts that the whole run consumes."""
    return range(config.run.num_steps * config.rollout.prompts_per_step)


def as_sampled(config: Config) -> Config:
    """The recipe with the seed, the draw of steps and the micro-batch that priors are sampled with.

    Steps are drawn for each prompt and group, which gives each the distribution of training whatever
    `sampler.share_steps` is. A micro-batch has one draw, so it holds samples of one group. Its two samples split at the
    first stochastic step: `rollout.branches` are of training's groups.
    """
    drawn = config.loss.replays_transitions and config.sampler.train_steps not in ("all", "window")
    size = config.rollout.micro_batch_size
    return replace(
        config,
        run=replace(config.run, seed=SEED),
        sampler=replace(config.sampler, share_steps="group", window_every=0),
        rollout=replace(
            config.rollout, branches=(), micro_batch_size=gcd(size, prior_groups(config)[1]) if drawn else size
        ),
    )


def steps_of_group(policy: Policy, sampled: Config, group: int) -> TrainedSteps:
    """The stochastic steps of a group of each prompt before training, as training draws them."""
    return sampled_steps(policy, sampled, -1 - group)


def rows_to_measure(config: Config, shards: PromptShards) -> list[int]:
    """Rows of the prompts whose anchors the run needs, in the order of their first visit; or of all of the split.

    Raises:
        ShardError: no such split, or it is smaller than a step's prompts.
    """
    order = EndlessOrder(shards, config.data.split, config.run.seed, config.rollout.prompts_per_step)
    if config.prior.prompts == "all":
        return shards.rows(config.data.split).tolist()
    return order.rows(positions_of(config))


def check_anchors(
    config: Config, shards: PromptShards, priors: Mapping[str, PriorTable], positions: range, *flags: str
) -> None:
    """Check that the prompts at these positions of the endless order have anchors.

    Args:
        flags: what the command that measures them needs besides the run's own.

    Raises:
        PriorError: names a reward, and how many prompts have none.
    """
    order = EndlessOrder(shards, config.data.split, config.run.seed, config.rollout.prompts_per_step)
    rows = order.rows(positions)
    ids = shards.ids(np.array(rows)).tolist()
    for name, table in priors.items():
        missing = [row for row, id_ in zip(rows, ids, strict=True) if id_ not in table.anchors]
        if missing:
            raise PriorError(
                f"the prior of reward {name!r} has no anchor for {len(missing)} of the {len(rows)} prompts that the "
                f"run visits, the first {shards.record(missing[0]).prompt!r}",
                *flags,
            )


def prompts_per_round(config: Config, ranks: int) -> int:
    """Prompts of which a group is sampled, scored and saved together: the fewest that keep all ranks busy.

    They fill one micro-batch of each sequence group, or as many as divide over its ranks for decoding. Pairs that share
    a start stay together, so that what precedes their first stochastic step is computed once.
    """
    sequence, micro_batch = config.parallel.sequence, as_sampled(config).rollout.micro_batch_size
    chunk = micro_batch * sequence // gcd(sequence, micro_batch)
    size = prior_groups(config)[1]
    per_group = lcm(chunk, size) if config.rollout.same_start else chunk
    return lcm(size, ranks // sequence * per_group) // size


@dataclass(frozen=True)
class PriorWork:
    """What `bpgo-video priors` samples for a recipe of which nothing is measured yet.

    Attributes:
        forwards: of a rank, expected over the draws of steps; see `expected_forwards`.
        micro_batch_size: samples of a forward; guidance doubles its rows.
    """

    prompts: int
    videos: int
    forwards: float
    micro_batch_size: int


def count_priors(config: Config, ranks: int, split_prompts: int | None = None) -> PriorWork:
    """The work of `bpgo-video priors` on so many ranks.

    Args:
        split_prompts: prompts of the split; None assumes as many as the run consumes.
    """
    consumed = len(positions_of(config))
    prompts = consumed if split_prompts is None else min(consumed, split_prompts)
    if config.prior.prompts == "all" and split_prompts is not None:
        prompts = split_prompts
    (groups, size), sampled, together = prior_groups(config), as_sampled(config), prompts_per_round(config, ranks)

    def forwards(prompts: int) -> float:
        if not prompts:
            return 0
        rollout = replace(sampled.rollout, prompts_per_step=prompts, group_size=size)
        return expected_forwards(replace(sampled, rollout=rollout), ranks // config.parallel.sequence)

    whole, rest = divmod(prompts, together)
    total = groups * (whole * forwards(together) + forwards(rest))
    return PriorWork(prompts, prompts * groups * size, total, sampled.rollout.micro_batch_size)
