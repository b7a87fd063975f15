"""One run of the surrogate study: a policy trained by one arm, in one regime, on one seed; and GRPO's learning rate."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from bpgo_video.study.arms import ArmLearner, reference_anchor
from bpgo_video.study.draws import Draws
from bpgo_video.study.judges import Judge, make_judge
from bpgo_video.study.preregistration import Arm, Regime, WorldSizes
from bpgo_video.study.world import World, make_world
from bpgo_video.types import PriorAnchor


@dataclass(frozen=True)
class Outcome:
    """What a run achieved.

    Attributes:
        gain: mean over all prompts of the true expected reward at the end, in true deviations within a group at the
            start, where it is 0.
        clear, ambiguous: the same over the first judge's clear and ambiguous prompts.
        scorings: of a video by all judges, on average.
        seconds: that the learner took.
    """

    gain: float
    clear: float
    ambiguous: float
    scorings: float
    seconds: float


@lru_cache(maxsize=4)
def setting(sizes: WorldSizes, once: bool, seed: int) -> tuple[World, Draws]:
    """The world and the random numbers of a seed."""
    prompts = sizes.steps * sizes.prompts_per_step if once else sizes.prompts
    return make_world(sizes, prompts, seed), Draws(sizes, prompts, seed)


def run_arm(sizes: WorldSizes, regime: Regime, arm: Arm, learning_rate: float, seed: int) -> Outcome:
    """Train a policy by one arm, with Adam.

    Args:
        learning_rate: GRPO's; the arm may multiply it.
    """
    world, draws = setting(sizes, regime.once, seed)
    judges = {f"judge {index}": make_judge(world, regime, sizes, seed, index) for index in range(arm.judges)}
    learner = ArmLearner(arm, world, judges, draws, reference_anchors(arm, world, judges, draws))
    theta = world.start()
    optimizer = torch.optim.Adam([theta], lr=arm.learning_rate * learning_rate)
    seconds = 0.0
    for step, (rows, noise) in enumerate(zip(draws.order, draws.noise, strict=True)):
        samples = world.samples(theta, rows, noise)
        started = time.perf_counter()
        advantage = learner.advantage(step, rows, samples)
        seconds += time.perf_counter() - started
        theta.grad = world.surrogate_gradient(rows, noise, advantage)
        optimizer.step()
    return outcome(world, judges["judge 0"], theta, learner.scorings / sizes.steps, seconds)


def reference_anchors(arm: Arm, world: World, judges: dict[str, Judge], draws: Draws) -> dict[str, PriorAnchor]:
    """The reference priors of an arm that needs them, by judge."""
    if arm.prior != "reference":
        return {}
    return {name: reference_anchor(world, judge, draws, index) for index, (name, judge) in enumerate(judges.items())}


def outcome(world: World, judge: Judge, theta: torch.Tensor, scorings: float, seconds: float) -> Outcome:
    reached = world.expected_reward(theta)
    clear, ambiguous = reached[~judge.ambiguous], reached[judge.ambiguous]
    return Outcome(float(reached.mean()), float(clear.mean()), float(ambiguous.mean()), scorings, seconds)
