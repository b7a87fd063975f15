"""The expected forwards of a rollout with shared prefixes, against all draws of trained steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from statistics import mean
from typing import Any

import pytest
import torch

from bpgo_video.config.bpgo import Config
from bpgo_video.diffusion.steps import STEP_SELECTIONS, precedes_trained, trained_before
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rollouts.forwards import expected_forwards
from bpgo_video.rollouts.prefixes import branches, spreads

NUM_STEPS = 5  # of which the first four can be trained
DRAWS = {
    "random": list(combinations(range(4), 2)),
    "random_window": [(0, 1), (1, 2), (2, 3)],
}


def changed(recipe: Config, **values: Any) -> Config:
    """Two of four steps of three prompts of four samples."""
    sampler = {"num_steps": NUM_STEPS, "train_steps": "random", "train_fraction": 0.5, "share_steps": "group"}
    rollout = {"prompts_per_step": 3, "group_size": 4, "micro_batch_size": 4, "same_start": True}
    run = {"num_steps": values.pop("training_steps", 1)}
    rollout |= {name: values.pop(name) for name in rollout if name in values}
    return replace(
        recipe,
        run=replace(recipe.run, **run),
        sampler=replace(recipe.sampler, **sampler | values),
        rollout=replace(recipe.rollout, **rollout),
    )


def first_steps(config: Config) -> Iterator[list[int]]:
    """Of each prompt, for each of the equally likely draws."""
    firsts = [min(steps) for steps in DRAWS[config.sampler.train_steps]]
    if config.sampler.share_steps == "batch":
        return ([first] * config.rollout.prompts_per_step for first in firsts)
    return (list(draw) for draw in product(firsts, repeat=config.rollout.prompts_per_step))


def counted(config: Config, first: list[int], ranks: int) -> float:
    """The mean over ranks of the forwards of one draw."""
    size, total = config.rollout.micro_batch_size, 0.0
    for rank in range(ranks):
        mesh, group_size = Mesh(rank, ranks, torch.device("cpu")), config.rollout.group_size
        planned = branches(first, mesh, group_size, size, spread=spreads(mesh, group_size, size))
        total += sum(NUM_STEPS - step for step in planned.steps)
        total += sum(len(rows) * end for rows, end in zip(planned.batches, planned.ends, strict=True)) / size
    return total / ranks


@pytest.mark.parametrize("selection", DRAWS)
@pytest.mark.parametrize("share", ["batch", "group"])
@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        (1, {}),
        (1, {"micro_batch_size": 2}),
        (3, {"micro_batch_size": 2}),
        (2, {"prompts_per_step": 4}),
        (4, {"prompts_per_step": 2, "micro_batch_size": 1}),
        (2, {"prompts_per_step": 3, "micro_batch_size": 1}),
    ],
)
def test_the_expectation_is_the_mean_of_all_draws(
    recipe: Config, selection: str, share: str, ranks: int, sizes: dict[str, int]
) -> None:
    config = changed(recipe, train_steps=selection, share_steps=share, **sizes)
    expected = mean(counted(config, first, ranks) for first in first_steps(config))
    assert expected_forwards(config, ranks) == pytest.approx(expected, rel=1e-12)
    assert expected < expected_forwards(changed(recipe, same_start=False, **sizes), ranks)


def test_a_moving_window_counts_each_place_alike(recipe: Config) -> None:
    """Three places of two steps, moved every second training step; one rank and one prefix of three prompts."""
    config = changed(recipe, train_steps="window", window_every=2, training_steps=6)
    assert expected_forwards(config, 1) == pytest.approx(3 * NUM_STEPS - (3 - 3 / 4) * mean([0, 1, 2]))
    assert expected_forwards(changed(recipe, train_steps="all"), 1) == 3 * NUM_STEPS


@pytest.mark.parametrize("selection", STEP_SELECTIONS)
def test_the_step_before_the_first_trained_one_has_the_frequency_of_draws(selection: str) -> None:
    generator = torch.Generator().manual_seed(0)
    firsts = torch.tensor([STEP_SELECTIONS[selection](8, 3, 1, generator)[0] for _ in range(4000)])
    for step in range(8):
        probability = precedes_trained(selection, 8, 3, 1, step)
        error = 5 * (probability * (1 - probability) / len(firsts)) ** 0.5
        assert float((firsts > step).double().mean()) == pytest.approx(probability, abs=error)


@pytest.mark.parametrize("selection", STEP_SELECTIONS)
def test_trained_steps_before_a_step_have_the_frequency_of_draws(selection: str) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [STEP_SELECTIONS[selection](8, 3, 1, generator) for _ in range(4000)]
    for step in range(9):
        before = torch.tensor([sum(index < step for index in draw) for draw in draws])
        expected = trained_before(selection, 8, 3, 1, step)
        assert len(expected) == len(draws[0]) + 1
        assert sum(expected) == pytest.approx(1)
        for count, probability in enumerate(expected):
            error = 5 * (probability * (1 - probability) / len(draws)) ** 0.5
            assert float((before == count).double().mean()) == pytest.approx(probability, abs=error)
