"""Replay: ratios exactly 1 until the policy changes, gradients, step weights and KL terms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bpgo_video.config.bpgo import Config, CreditConfig
from bpgo_video.config.policy import LoraConfig
from bpgo_video.diffusion.sde import SAMPLERS, steps_of
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.policies import Policy, load_policy
from bpgo_video.policies.lora import add_lora
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import trained_steps_of
from bpgo_video.rollouts.updates import Objective, Reference, adapters_off, optimise
from bpgo_video.types import Loss, PromptBatch, Trajectory

CPU = torch.device("cpu")


class PlainLearner:
    """SGD in one process."""

    def __init__(self, module: torch.nn.Module, learning_rate: float):
        self.optimizer = torch.optim.SGD(module.parameters(), lr=learning_rate)
        self.updates = 0

    def replaying(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> float:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return 1.0


@pytest.fixture
def fresh_policy(recipe: Config) -> Policy:
    return load_policy(recipe.policy.folder, max_sequence_length=16)


def rollout(
    policy: Policy, recipe: Config, reference: Reference | None = None, **sections: dict[str, Any]
) -> tuple[Replay, list[Trajectory]]:
    """A rollout of two groups of four over four steps, all but the last trained, with given advantages."""
    every = {"num_steps": 4, "train_steps": "all", "share_steps": "batch"}
    sampler = replace(recipe.sampler, **{**every, **sections.pop("sampler", {})})
    loss = replace(recipe.loss, **{"step_weights": "none", **sections.pop("loss", {})})
    recipe = replace(recipe, sampler=sampler, loss=loss)
    texts = ("a red circle moving left", "a blue object")
    prompts = PromptBatch(
        torch.tensor([1, 2]), texts, policy.encode(texts), policy.encode(["", "a green square"]), torch.tensor([1, 0])
    )
    chunks = sample_chunks(
        training_denoiser(policy, recipe), prompts, Mesh(0, 1, CPU), group_size=4, micro_batch_size=4,
        latent_shape=policy.latent_shape(recipe.video), key=(0, "rollout", 0),
        trained_steps=trained_steps_of(policy, recipe, 0),
    )  # fmt: skip
    advantage = torch.tensor([[1.0, -1.0, 0.5, -0.5], [0.2, -0.2, 1.5, -1.5]])
    advantages = GroupAdvantages(advantage, advantage.flip(1), torch.tensor([1.2, 0.8]), {})
    trajectories = [trajectory for chunk in chunks for trajectory in chunk.trajectories]
    return Replay(policy, recipe, prompts, advantages, 0, CPU, reference), trajectories


@torch.no_grad()
def total_loss(objective: Objective, trajectories: list[Trajectory]) -> float:
    passes = ((trajectory, index) for trajectory in trajectories for index in objective.passes(trajectory))
    return sum(float(objective.loss(*one).value) for one in passes)


def losses(objective: Replay, trajectories: list[Trajectory]) -> Iterator[dict[str, Tensor]]:
    for trajectory in trajectories:
        for index in objective.passes(trajectory):
            yield dict(objective.loss(trajectory, index).metrics)


def gradients(objective: Replay, trajectories: list[Trajectory]) -> list[Tensor]:
    transformer = objective.denoiser.policy.transformers["transformer"]
    for trajectory in trajectories:
        for index in objective.passes(trajectory):
            objective.loss(trajectory, index).value.backward()
    found = [parameter.grad.clone() for parameter in transformer.parameters()]
    transformer.zero_grad()
    return found


def test_zero_frame_credit_gives_the_gradient_of_whole_videos(fresh_policy: Policy, recipe: Config) -> None:
    """At a ratio of 1; the credit of a frame affects only that frame's log-prob."""
    by_video, trajectories = rollout(fresh_policy, recipe)
    by_frame, in_frames = rollout(fresh_policy, replace(recipe, credit=CreditConfig(kind="segment")))
    nothing = torch.zeros(2, 4, 3)
    silent = replace(by_frame, advantages=replace(by_frame.advantages, by_frame=nothing))
    for metrics in losses(silent, in_frames):
        assert float(metrics["ratio_min"]) == float(metrics["ratio_max"]) == 1.0
    expected = gradients(by_video, trajectories)
    for found, one in zip(gradients(silent, in_frames), expected, strict=True):
        assert (found - one).norm() <= 1e-5 * one.norm()
    added = nothing.clone()
    added[..., 0], added[..., 2] = 0.5, -0.5
    credited = replace(by_frame, advantages=replace(by_frame.advantages, by_frame=added))
    moved = gradients(credited, in_frames)
    assert any((found - one).norm() > 1e-2 * one.norm() for found, one in zip(moved, expected, strict=True))


@pytest.mark.parametrize("loss", [{}, {"ratio": "guard"}, {"trust_region": "divergence_mask"}])
def test_the_ratio_is_exactly_one_before_any_update(policy: Policy, recipe: Config, loss: dict[str, Any]) -> None:
    for metrics in losses(*rollout(policy, recipe, loss=loss)):
        assert float(metrics["ratio_min"]) == float(metrics["ratio_max"]) == 1.0


def test_the_ratio_is_exactly_one_with_per_prompt_negative_prompts(policy: Policy, recipe: Config) -> None:
    objective, trajectories = rollout(policy, recipe, sampler={"guidance_scale": 3.0})
    for metrics in losses(objective, trajectories):
        assert float(metrics["ratio_min"]) == float(metrics["ratio_max"]) == 1.0
    other = replace(objective, prompts=replace(objective.prompts, negative_rows=torch.tensor([0, 1])))
    assert all(float(metrics["ratio_max"]) != 1.0 for metrics in losses(other, trajectories))


def test_a_perturbed_latent_changes_the_ratio(policy: Policy, recipe: Config) -> None:
    objective, trajectories = rollout(policy, recipe)
    trajectories[0].latents[1, 2].view(-1)[7] += 0.01
    assert max(float(metrics["log_ratio_abs_max"]) for metrics in losses(objective, trajectories)) > 1e-6


def test_the_ratio_differs_from_one_in_the_second_update(fresh_policy: Policy, recipe: Config) -> None:
    objective, trajectories = rollout(fresh_policy, recipe)
    learner = PlainLearner(fresh_policy.transformers["transformer"], learning_rate=0.1)
    metrics = optimise(learner, objective, trajectories, updates_per_rollout=2).metrics
    assert learner.updates == 2
    assert metrics["ratio_error_first_update_max"] == 0.0
    assert metrics["log_ratio_abs_max"] > 1e-7


@pytest.mark.parametrize("loss", [{}, {"ratio": "guard", "step_weights": "guard"}, {"step_weights": "flash"},
                                  {"trust_region": "divergence_mask", "divergence_limit": 1.0}])  # fmt: skip
def test_an_update_lowers_its_loss(fresh_policy: Policy, recipe: Config, loss: dict[str, Any]) -> None:
    objective, trajectories = rollout(fresh_policy, recipe, loss={**loss, "clip_range": (0.9, 9.0)})
    learner = PlainLearner(fresh_policy.transformers["transformer"], learning_rate=1e-2)
    before = total_loss(objective, trajectories)
    optimise(learner, objective, trajectories, updates_per_rollout=1)
    assert total_loss(objective, trajectories) < before


class StepNumber(Replay):
    """An objective whose loss is the number of the denoising step, from 1."""

    def loss(self, trajectory: Trajectory, index: int) -> Loss:
        return Loss(torch.tensor(index + 1.0), {"ratio_max": torch.ones(()), "ratio_min": torch.ones(())})


class RecordingLearner:
    """Records the losses of each update instead of training."""

    def __init__(self) -> None:
        self.updates: list[list[float]] = [[]]

    def replaying(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.updates[-1].append(float(loss))
        if last:
            self.updates.append([])

    def step(self) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("updates_per_rollout", "expected"),
    [(1, [[1 / 6, 2 / 6, 3 / 6] * 2]), (3, [[1 / 2] * 2, [2 / 2] * 2, [3 / 2] * 2])],
)
def test_an_update_averages_the_losses_of_its_micro_batches_and_steps(
    policy: Policy, recipe: Config, updates_per_rollout: int, expected: list[list[float]]
) -> None:
    objective, trajectories = rollout(policy, recipe)
    learner = RecordingLearner()
    counted = StepNumber(**{field.name: getattr(objective, field.name) for field in fields(objective)})
    optimise(learner, counted, trajectories, updates_per_rollout)
    assert learner.updates == [*map(pytest.approx, expected), []]


def test_a_step_weight_scales_only_the_loss_of_its_step(policy: Policy, recipe: Config) -> None:
    plain, trajectories = rollout(policy, recipe)
    loss = replace(plain.config.loss, step_weights="guard")
    weighted = replace(plain, config=replace(plain.config, loss=loss))
    assert weighted.step_weights != plain.step_weights == [1.0, 1.0, 1.0]
    for index, weight in enumerate(weighted.step_weights):
        expected = weight * plain.loss(trajectories[0], index).value
        torch.testing.assert_close(weighted.loss(trajectories[0], index).value, expected, rtol=0, atol=0)


def test_each_group_can_train_a_different_step(policy: Policy, recipe: Config) -> None:
    sampler = {"train_steps": "random_window", "train_fraction": 0.1, "share_steps": "group"}
    chosen = set()
    for seed in range(6):
        objective, trajectories = rollout(policy, replace(recipe, run=replace(recipe.run, seed=seed)), sampler=sampler)
        assert [len(objective.passes(trajectory)) for trajectory in trajectories] == [1, 1]
        chosen.add(tuple(trajectory.trained_steps for trajectory in trajectories))
        for metrics in losses(objective, trajectories):
            assert float(metrics["ratio_min"]) == 1.0
    assert any(first != second for first, second in chosen)


class Perturbed(Reference):
    """A reference whose velocity differs by .1."""

    def velocity(self, denoiser: Any, *arguments: Any) -> Tensor:
        with torch.no_grad():
            return denoiser.velocity(*arguments) + 0.1


@pytest.mark.parametrize("space", ["velocity", "mean"])
def test_the_penalty_towards_the_starting_policy_is_its_divergence_and_has_a_gradient(
    fresh_policy: Policy, recipe: Config, space: str
) -> None:
    settings = {"kl_weight": 2.0, "kl_space": space}
    objective, trajectories = rollout(fresh_policy, recipe, Perturbed(fresh_policy), loss=settings)
    free = replace(objective, reference=None)
    index = 1
    held, plain = objective.loss(trajectories[0], index), free.loss(trajectories[0], index)
    step = steps_of(objective.denoiser.sigmas)[index]
    unit = torch.ones(1, 1, 1, 1, 1)
    transition = SAMPLERS[objective.denoiser.sampler](unit, torch.zeros_like(unit), step, objective.denoiser.eta)
    expected = 0.01 if space == "velocity" else 0.01 * float((transition.mean / transition.std).square()) / 2
    assert float(held.metrics["kl"]) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(held.value, plain.value + 2 * held.metrics["kl"])
    weight = next(fresh_policy.transformers["transformer"].proj_out.parameters())
    pulled, pushed = (torch.autograd.grad(loss.value, weight)[0] for loss in (held, plain))
    assert (pulled - pushed).norm() > 1e-3 * pushed.norm()


def test_before_any_update_the_starting_policy_equals_the_policy(fresh_policy: Policy, recipe: Config) -> None:
    objective, trajectories = rollout(fresh_policy, recipe, Reference(fresh_policy), loss={"kl_weight": 1.0})
    assert float(objective.loss(trajectories[0], 0).metrics["kl"]) == 0.0


@pytest.mark.parametrize("space", ["velocity", "mean"])
def test_the_penalty_towards_the_sampling_policy_needs_no_forward(
    fresh_policy: Policy, recipe: Config, space: str
) -> None:
    """The recorded means give the divergence of velocities or means that a frozen copy would give."""
    settings = {"kl_weight": 2.0, "kl_space": space}
    start = load_policy(recipe.policy.folder, max_sequence_length=16)
    objective, trajectories = rollout(fresh_policy, recipe, loss={**settings, "kl_reference": "previous"})
    assert float(objective.loss(trajectories[0], 1).metrics["kl"]) == 0.0
    with torch.no_grad():
        for parameter in fresh_policy.transformers["transformer"].proj_out.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    copied, _ = rollout(fresh_policy, recipe, Reference(start), loss=settings)
    weight = next(fresh_policy.transformers["transformer"].proj_out.parameters())
    for index in (0, 2):
        found, expected = (one.loss(trajectories[0], index) for one in (objective, copied))
        torch.testing.assert_close(found.metrics["kl"], expected.metrics["kl"], rtol=1e-4, atol=0)
        gradients = [torch.autograd.grad(loss.value, weight)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_adapters_are_disabled_only_for_the_reference(fresh_policy: Policy, recipe: Config) -> None:
    module = fresh_policy.transformers["transformer"]
    add_lora(module, LoraConfig(rank=4), seed=0)
    reference = Reference(fresh_policy, partial(adapters_off, fresh_policy.transformers))
    objective, trajectories = rollout(fresh_policy, recipe, reference, loss={"kl_weight": 1.0})
    assert float(objective.loss(trajectories[0], 0).metrics["kl"]) == 0.0, "adapters start at zero"
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    first, second = (float(objective.loss(trajectories[0], 0).metrics["kl"]) for _ in range(2))
    assert first == second > 0
