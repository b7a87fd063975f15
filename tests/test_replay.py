"""Replay: the ratio is exactly 1 until the policy moves, and what is stored is what is replayed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bpgo_video.bpgo import GroupAdvantages
from bpgo_video.config import Config
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.policies import Policy, load_policy
from bpgo_video.replay import optimise, replay_loss
from bpgo_video.rollout import Denoiser, sample_chunks, training_denoiser
from bpgo_video.types import Conditioning, PromptBatch, Trajectory

CPU = torch.device("cpu")


class PlainLearner:
    """SGD on one process."""

    def __init__(self, module: torch.nn.Module, learning_rate: float):
        self.optimizer = torch.optim.SGD(module.parameters(), lr=learning_rate)
        self.updates = 0

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> float:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return 1.0


@pytest.fixture
def own_policy(recipe: Config) -> Policy:
    return load_policy(recipe.policy.folder, max_sequence_length=16)


Case = tuple[Denoiser, list[Trajectory], PromptBatch, Conditioning, GroupAdvantages]


def rollout(policy: Policy, recipe: Config) -> Case:
    recipe = replace(recipe, sampler=replace(recipe.sampler, num_steps=4, train_steps="all"))
    texts = ("a red circle moving left", "a blue object")
    prompts = PromptBatch(torch.tensor([1, 2]), texts, policy.encode(texts))
    denoiser, negative = training_denoiser(policy, recipe, 0), policy.encode([""])
    chunks = sample_chunks(
        denoiser, prompts, negative, Mesh(0, 1, CPU), group_size=4, micro_batch_size=4,
        latent_shape=policy.latent_shape(recipe.video), key=(0, "rollout", 0),
    )  # fmt: skip
    advantage = torch.tensor([[1.0, -1.0, 0.5, -0.5], [0.2, -0.2, 1.5, -1.5]])
    advantages = GroupAdvantages(advantage, advantage.flip(1), torch.tensor([1.2, 0.8]), {})
    return denoiser, [chunk.trajectories[0] for chunk in chunks], prompts, negative, advantages


def losses(case: Case) -> Iterator[dict[str, Tensor]]:
    denoiser, trajectories, prompts, negative, advantages = case
    for trajectory in trajectories:
        for index in denoiser.trained_steps:
            yield dict(
                replay_loss(denoiser, trajectory, index, prompts, negative, advantages, 0.5, (1e-3, 1e-3)).metrics
            )


def test_ratio_is_exactly_one_before_any_update(policy: Policy, recipe: Config) -> None:
    for metrics in losses(rollout(policy, recipe)):
        assert float(metrics["ratio_min"]) == float(metrics["ratio_max"]) == 1.0


def test_a_disturbed_latent_is_seen_in_the_ratio(policy: Policy, recipe: Config) -> None:
    case = rollout(policy, recipe)
    case[1][0].latents[1, 2].view(-1)[7] += 0.01
    assert max(float(metrics["log_ratio_abs_max"]) for metrics in losses(case)) > 1e-6


def test_the_second_update_sees_a_policy_that_moved(own_policy: Policy, recipe: Config) -> None:
    denoiser, trajectories, prompts, negative, advantages = rollout(own_policy, recipe)
    learner = PlainLearner(own_policy.transformers["transformer"], learning_rate=0.1)
    metrics = optimise(
        learner, denoiser, trajectories, prompts, negative, advantages,
        updates_per_rollout=2, zeta=0.5, clip_range=(1e-3, 1e-3),
    )  # fmt: skip
    assert learner.updates == 2
    assert metrics["ratio_error_first_update_max"] == 0.0
    assert metrics["log_ratio_abs_max"] > 1e-7


def test_an_update_lowers_its_own_loss(own_policy: Policy, recipe: Config) -> None:
    denoiser, trajectories, prompts, negative, advantages = rollout(own_policy, recipe)
    learner = PlainLearner(own_policy.transformers["transformer"], learning_rate=1e-2)
    wide = (0.9, 9.0)

    def total() -> float:
        with torch.no_grad():
            return sum(
                float(replay_loss(denoiser, trajectory, index, prompts, negative, advantages, 0.5, wide).value)
                for trajectory in trajectories
                for index in denoiser.trained_steps
            )

    before = total()
    optimise(
        learner, denoiser, trajectories, prompts, negative, advantages, updates_per_rollout=1, zeta=0.5, clip_range=wide
    )
    assert total() < before
