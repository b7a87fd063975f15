"""Replay of selected samples: the gradient equals that of all samples, with equally many forwards on every rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.policies import Policy, load_policy
from bpgo_video.rollouts.replay import samples_to_replay
from bpgo_video.types import Trajectory
from tests.rollouts.test_replay import gradients, rollout

CPU = torch.device("cpu")
ALONE = Mesh(0, 1, CPU)


def micro_batches(*samples: list[tuple[int, int]]) -> list[Trajectory]:
    """Micro-batches of (prompt, sample) pairs whose latents identify them."""
    found = []
    for pairs in samples:
        rows, indices = (torch.tensor(values) for values in zip(*pairs, strict=True))
        latents = (10.0 * rows + indices).view(-1, 1, 1, 1, 1, 1).expand(-1, 2, 1, 1, 1, 1)
        found.append(Trajectory(rows, indices, (0,), latents, torch.zeros(len(pairs), 1)))
    return found


def owners(trajectory: Trajectory) -> list[tuple[int, int]]:
    pairs = list(zip(trajectory.prompt_rows.tolist(), trajectory.sample_index.tolist(), strict=True))
    assert trajectory.latents[:, 0].flatten().tolist() == [10.0 * prompt + sample for prompt, sample in pairs]
    return pairs


TRAINS = torch.tensor([[True, False, False, True], [False, True, True, False]])
BATCHES = ([(0, 0), (0, 1)], [(0, 2), (0, 3)], [(1, 0), (1, 1)], [(1, 2), (1, 3)])


@pytest.mark.parametrize("by_prompt", [True, False])
def test_selected_samples_are_joined_into_full_micro_batches(by_prompt: bool) -> None:
    kept = samples_to_replay(micro_batches(*BATCHES), TRAINS, by_prompt, ALONE)
    assert [owners(trajectory) for trajectory in kept] == [[(0, 0), (0, 3)], [(1, 1), (1, 2)]]


@dataclass(frozen=True)
class OneOfTwoRanks(Mesh):
    """One of two ranks, where the other one needs more micro-batches."""

    needs: int = 0

    def largest(self, value: int) -> int:
        return max(value, self.needs)


def test_ranks_process_equally_many_micro_batches() -> None:
    one_each = torch.tensor([[True, False, False, False], [False, False, False, False]])
    kept = samples_to_replay(micro_batches(*BATCHES), one_each, True, OneOfTwoRanks(0, 2, CPU, needs=3))
    assert [owners(trajectory) for trajectory in kept] == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(1, 0), (1, 1)]]
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert len(samples_to_replay(micro_batches(*BATCHES), nothing, False, ALONE)) == 1


def test_the_gradient_equals_that_of_all_samples(fresh_policy: Policy, recipe: Config) -> None:
    objective, trajectories = rollout(fresh_policy, recipe)
    advantage = torch.tensor([[1.0, 0.0, 0.0, -1.0], [0.0, 0.7, -0.7, 0.0]])
    advantages = GroupAdvantages(advantage, 0.5 * advantage, torch.tensor([1.2, 0.8]), {})
    whole = replace(objective, advantages=advantages)
    kept = samples_to_replay(trajectories, advantages.trains, False, ALONE)
    assert (len(trajectories), len(kept)) == (2, 1)
    few = replace(objective, advantages=advantages.times(len(kept) / len(trajectories)))
    for index in few.passes(kept[0]):
        metrics = few.loss(kept[0], index).metrics
        assert float(metrics["ratio_min"]) == float(metrics["ratio_max"]) == 1.0
    expected = [gradient / len(trajectories) for gradient in gradients(whole, trajectories)]
    for found, one in zip(gradients(few, kept), expected, strict=True):
        assert (found / len(kept) - one).norm() <= 1e-5 * one.norm()


@pytest.fixture
def fresh_policy(recipe: Config) -> Policy:
    return load_policy(recipe.policy.folder, max_sequence_length=16)
