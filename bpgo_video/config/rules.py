"""Which settings do not go together? Rules over several keys; each message has the values, the rule and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from bpgo_video.config.bpgo import Config, ConfigError, LossConfig, ParallelConfig, PolicyConfig
from bpgo_video.config.learner import aggregate_rules, broken_rules


@runtime_checkable
class Divided(Protocol):
    """What a recipe says of how samples are divided."""

    @property
    def parallel(self) -> ParallelConfig: ...

    @property
    def micro_batch_size(self) -> int: ...


REWARD_NAME = re.compile(r"[\w:-][\w.:-]*")


def reward_rules(config: Config) -> Iterator[str]:
    if not any(reward.weight > 0 for reward in config.rewards.values()):
        yield "a policy is trained on at least one reward of weight above 0; rewards has none"
    for name in (*config.rewards, *config.evaluation.rewards):
        if not REWARD_NAME.fullmatch(name):
            yield f"reward name {name!r} must consist of letters, digits and any of . : _ -"
    leaked = set(config.rewards) & set(config.evaluation.rewards)
    if leaked:
        yield (
            f"{sorted(leaked)} are in rewards and in evaluation.rewards; use two names to train on "
            "a reward and also report it on held-out prompts"
        )
    yield from aggregate_rules("rewards", config.rewards)
    yield from aggregate_rules("evaluation.rewards", config.evaluation.rewards)


def learner_rules(config: Config) -> Iterator[str]:
    yield from broken_rules(
        config.prior,
        config.advantage,
        config.credit,
        config.bpgo,
        config.rewards,
        prompts_per_step=config.rollout.prompts_per_step,
        group_size=config.rollout.group_size,
        objective=config.loss.objective,
    )


def sampler_rules(config: Config) -> Iterator[str]:
    sampler, rollout = config.sampler, config.rollout
    if sampler.name == "cps" and sampler.eta > 1:
        yield f"sampler.eta is {sampler.eta}; cps takes values up to 1"
    if sampler.share_steps == "group" and rollout.group_size % rollout.micro_batch_size:
        yield (
            "sampler.share_steps is 'group', which gives each prompt its own trained steps, but "
            f"rollout.micro_batch_size {rollout.micro_batch_size} mixes prompts of group_size {rollout.group_size}; "
            "set it to a divisor of that"
        )
    trained, updates = sampler.trained_count, config.optim.updates_per_rollout
    if updates > trained:
        yield (
            f"optim.updates_per_rollout is {updates}, but {trained} of {sampler.num_steps} denoising steps are trained "
            f"and each update needs one of its own; lower it to {trained}, or train more steps"
        )


def reference_rules(config: Config) -> Iterator[str]:
    """A pull needs a reference that differs from the policy, and log-probs or velocities to compare."""
    loss = config.loss
    if loss.kl_weight == 0:
        return
    if loss.objective != "policy_gradient":
        yield (
            f"loss.kl_weight is {loss.kl_weight} with loss.objective = {loss.objective!r}, which has no pull towards a "
            "reference; set kl_weight to 0, or the objective to 'policy_gradient'"
        )
    if loss.kl_reference == "ema" and config.ema.decay == 0:
        yield "loss.kl_reference is 'ema' with ema.decay = 0, which keeps no average; set ema.decay, say to 0.99"
    if loss.kl_reference == "previous" and config.optim.updates_per_rollout == 1:
        yield (
            "loss.kl_reference is 'previous' with optim.updates_per_rollout = 1: the policy is the one that sampled, "
            "so that the divergence and its gradient are 0; take 2 updates or more, or another reference"
        )


def objective_rules(config: Config) -> Iterator[str]:
    """What compares the rollout's own transitions needs an objective that replays them."""
    loss, plain = config.loss, LossConfig()
    if loss.objective == "policy_gradient":
        return
    for name in ("ratio", "trust_region", "step_weights"):
        if getattr(loss, name) != getattr(plain, name):
            yield (
                f"loss.{name} is {getattr(loss, name)!r} with loss.objective = {loss.objective!r}, which learns from "
                f"final videos and replays no transition; set it to {getattr(plain, name)!r}, or the objective to "
                "'policy_gradient'"
            )


def evaluation_rules(config: Config) -> Iterator[str]:
    if "ema" in config.evaluation.measured and config.ema.decay == 0:
        yield (
            f"evaluation.weights is {config.evaluation.weights!r} with ema.decay = 0, which keeps no average; set "
            "ema.decay (0.99 forgets an update after some hundred), or evaluate the 'raw' weights"
        )


def kernel_rules(config: Config) -> Iterator[str]:
    yield from compiling_rules(config.policy, config.parallel)


def compiling_rules(policy: PolicyConfig, parallel: ParallelConfig) -> Iterator[str]:
    """What compiled blocks do not go with, in recipes of every kind."""
    if policy.compile_blocks and parallel.sequence > 1:
        yield (
            f"policy.compile_blocks is true with parallel.sequence = {parallel.sequence}, whose exchanges have not "
            "been tried inside compiled blocks; set one of them to its default"
        )


RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    reward_rules,
    learner_rules,
    sampler_rules,
    reference_rules,
    objective_rules,
    evaluation_rules,
    kernel_rules,
)


def check(config: Config) -> None:
    """Whether the values go together.

    Raises:
        ConfigError: the first rule that is broken.
    """
    for rule in RULES:
        for message in rule(config):
            raise ConfigError(message)


def check_world(config: Config, world_size: int) -> None:
    """Every rank gets the same whole number of micro-batches. Raises ConfigError, as `check_division`."""
    rollout = config.rollout
    samples = rollout.prompts_per_step * rollout.group_size
    told = f"prompts_per_step x group_size = {rollout.prompts_per_step} x {rollout.group_size} = {samples} samples"
    check_division(config, world_size, samples, told)


def check_division(config: Divided, world_size: int, samples: int, told: str) -> None:
    """Sequence groups divide the ranks, and micro-batches of all groups the samples of a step.

    Args:
        told: the samples, in words.

    Raises:
        ConfigError: names the numbers and the nearest ones that work.
    """
    sequence = config.parallel.sequence
    if world_size % sequence:
        raise ConfigError(
            f"parallel.sequence is {sequence}, which does not divide {world_size} ranks into groups; it can be one of "
            f"{[size for size in range(1, world_size + 1) if world_size % size == 0]}"
        )
    groups = world_size // sequence
    unit = groups * config.micro_batch_size
    if samples % unit:
        raise ConfigError(
            f"{told} do not divide into {groups} {'ranks' if sequence == 1 else 'sequence groups'} x micro_batch_size "
            f"{config.micro_batch_size} = {unit}; change one of them so that the samples are a multiple (for example "
            f"{max(unit, samples - samples % unit)})"
        )
