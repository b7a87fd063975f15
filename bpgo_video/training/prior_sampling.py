"""How `bpgo-video priors` samples the starting policy: which prompts, in which groups and rounds, and how many videos.

A prompt's samples are groups, each sampled as a group of training is: with its own draw of stochastic steps and, with
`rollout.same_start`, one start. Two samples are enough to measure the spread within a start, and more starts make the
mean over all samples more exact: pairs. Without `same_start` all samples of a prompt are one group.

The noise depends on the prompt and the group, not on the run's seed, so that runs of several seeds share their anchors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, lcm

from bpgo_video.config.bpgo import Config
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.stream import EndlessOrder
from bpgo_video.policies import Policy
from bpgo_video.rollouts.rules import TrainedSteps, sampled_steps

SEED = 0


def prior_groups(config: Config) -> tuple[int, int]:
    """Groups of each prompt, and samples of a group."""
    return (config.prior.samples // 2, 2) if config.rollout.same_start else (1, config.prior.samples)


def positions_of(config: Config) -> range:
    """Positions of the endless order of prompts that the whole run consumes."""
    return range(config.run.num_steps * config.rollout.prompts_per_step)


def as_sampled(config: Config) -> Config:
    """The recipe with the seed, the draw of steps and the micro-batch that priors are sampled with.

    Steps are drawn for each prompt and group, which gives each the distribution of training whatever
    `sampler.share_steps` is. A micro-batch has one draw, so it holds samples of one group.
    """
    drawn = config.loss.replays_transitions and config.sampler.train_steps not in ("all", "window")
    size = config.rollout.micro_batch_size
    return replace(
        config,
        run=replace(config.run, seed=SEED),
        sampler=replace(config.sampler, share_steps="group"),
        rollout=replace(config.rollout, micro_batch_size=gcd(size, prior_groups(config)[1]) if drawn else size),
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


def prompts_per_round(config: Config, ranks: int) -> int:
    """Prompts of which a group is sampled, scored and saved together: the fewest that keep all ranks busy.

    They fill one micro-batch of each sequence group, or as many as divide over its ranks for decoding.
    """
    sequence, micro_batch = config.parallel.sequence, as_sampled(config).rollout.micro_batch_size
    chunk = micro_batch * sequence // gcd(sequence, micro_batch)
    size = prior_groups(config)[1]
    return lcm(size, ranks // sequence * chunk) // size


@dataclass(frozen=True)
class PriorWork:
    """What `bpgo-video priors` samples for a recipe of which nothing is measured yet.

    Attributes:
        forwards: of a rank: its micro-batches times the denoising steps.
        micro_batch_size: samples of a forward; guidance doubles its rows.
    """

    prompts: int
    videos: int
    forwards: int
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
    (groups, size), micro_batch = prior_groups(config), as_sampled(config).rollout.micro_batch_size
    together, unit = prompts_per_round(config, ranks), ranks // config.parallel.sequence * micro_batch
    whole, rest = divmod(prompts, together)
    micro_batches = groups * (whole * (together * size // unit) + -(-rest * size // unit))
    return PriorWork(prompts, prompts * groups * size, micro_batches * config.sampler.num_steps, micro_batch)
