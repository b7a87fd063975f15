"""Differentiated rewards: the gradient of the whole chain against finite differences and an unrolled reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bpgo_video.config.bpgo import Config, ConfigError, RewardConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy, load_policy
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.remote import RemoteReward
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rewards.worker import WorkerReward
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.draft import DifferentiatedRewards
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import sampled_steps
from bpgo_video.types import PromptBatch, RolloutChunk

CPU = torch.device("cpu")
STEPS = 3


@pytest.fixture
def fresh_policy(recipe: Config) -> Policy:
    return load_policy(recipe.policy.folder, max_sequence_length=16)


def draft(policy: Policy, recipe: Config, steps: int) -> tuple[DifferentiatedRewards, list[RolloutChunk]]:
    """Two samples of one prompt, with the embedded CLIP and motion model as rewards."""
    config = replace(
        recipe,
        sampler=replace(recipe.sampler, num_steps=STEPS),
        loss=replace(recipe.loss, objective="draft", draft_steps=steps),
        rollout=replace(recipe.rollout, same_start=False),
    )
    texts = ("a red circle moving left",)
    prompts = PromptBatch(torch.tensor([1]), texts, policy.encode(texts), policy.encode([""]))
    chunks = sample_chunks(
        training_denoiser(policy, config), prompts, Mesh(0, 1, CPU), group_size=2, micro_batch_size=2,
        latent_shape=policy.latent_shape(config.video), key=(0, "rollout", 0),
        trained_steps=sampled_steps(policy, config, 0),
    )  # fmt: skip
    suite = RewardSuite(config.rewards, CPU, config.video.fps)
    return DifferentiatedRewards(policy, config, prompts, None, 0, CPU, suite=suite), list(chunks)  # type: ignore[arg-type]


def backward(objective: DifferentiatedRewards, chunks: list[RolloutChunk]) -> float:
    """The passes of an update of one micro-batch, as in `optimise`; the loss."""
    arranged, (trajectory,) = objective.arranged(chunks[0].trajectories, Mesh(0, 1, CPU))
    values = []
    for index in arranged.passes(trajectory):
        loss = arranged.loss(trajectory, index)
        (loss.value / len(arranged.passes(trajectory))).backward()
        values.append(float(loss.value.detach()))
    assert min(values) == max(values), "each pass states the whole loss"
    return values[0]


def unrolled(objective: DifferentiatedRewards, chunks: list[RolloutChunk], steps: int) -> Tensor:
    """Minus the mean reward in one graph without checkpoints: the last steps from the latents of the rollout."""
    (trajectory,) = chunks[0].trajectories
    conditioning = {name: x.expand(2, *x.shape[1:]) for name, x in objective.prompts.conditioning.items()}
    latents, sigmas = trajectory.latents[:, STEPS - steps], objective.denoiser.sigmas
    for index in range(STEPS - steps, STEPS):
        velocity = objective.policy.velocity(latents, sigmas[index], conditioning)
        latents = latents + (sigmas[index + 1] - sigmas[index]) * velocity
    assert objective.suite is not None
    videos = objective.policy.pixels(latents, conditioning)
    return -objective.suite.total(replace(chunks[0], videos=videos), objective.prompts).mean()


def gradients(module: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in module.parameters()]
    module.zero_grad()
    return found


@pytest.fixture
def frozen(fresh_policy: Policy) -> Iterator[nn.Module]:
    """The VAE, which must have no gradient at the end of a test."""
    yield fresh_policy.pipeline.vae
    assert all(parameter.grad is None for parameter in fresh_policy.pipeline.vae.parameters())


@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_the_gradient_of_the_chain_equals_one_graph_and_finite_differences(
    fresh_policy: Policy, recipe: Config, frozen: nn.Module, steps: int
) -> None:
    """Transformer, K steps, VAE, CLIP and motion model, in fp32; differences along the gradient itself."""
    objective, chunks = draft(fresh_policy, recipe, steps)
    transformer = fresh_policy.transformers["transformer"]
    value = backward(objective, chunks)
    assert objective.suite is not None
    for reward in objective.suite.rewards.values():
        networks = [part for part in vars(reward.model).values() if isinstance(part, nn.Module)]
        assert all(parameter.grad is None for network in networks for parameter in network.parameters())
    found = gradients(transformer)
    scored = objective.suite.score(chunks[0], objective.prompts)
    total = sum(weight * scored.videos[name].mean() for name, weight in objective.suite.weights.items())
    assert value == pytest.approx(-float(total), abs=1e-5), "minus the rewards of the rollout's own scoring"
    unrolled(objective, chunks, steps).backward()
    for one, expected in zip(found, gradients(transformer), strict=True):
        assert (one - expected).norm() <= 1e-3 * expected.norm() + 1e-7
    norm = float(torch.stack([one.double().square().sum() for one in found]).sum().sqrt())
    values, size = [], 1e-3
    for sign in (1, -2):  # one step up, then to one step down
        with torch.no_grad():
            for parameter, gradient in zip(transformer.parameters(), found, strict=True):
                parameter.add_(sign * size / norm * gradient)
            values.append(float(unrolled(objective, chunks, steps)))
    assert (values[0] - values[1]) / (2 * size) == pytest.approx(norm, rel=2e-2)


def test_rewards_without_a_gradient_are_refused_by_name(policy: Policy, recipe: Config) -> None:
    blind = {"oracle": RewardConfig(model="shapes_oracle"), **recipe.rewards}
    with pytest.raises(ConfigError, match=r"not differentiable: oracle \(shapes_oracle\); set their weight to 0"):
        RewardSuite(blind, CPU, 8.0).require_differentiable()
    unweighted = {**blind, "oracle": RewardConfig(model="shapes_oracle", weight=0.0)}
    RewardSuite(unweighted, CPU, 8.0).require_differentiable()
    assert not any(kind.differentiable for kind in (RemoteReward, WorkerReward)), "their gradient is elsewhere"
    objective, chunks = draft(policy, recipe, 1)
    lying = {"lying": RewardConfig(model="tests.distributed.toy_rewards:Blind")}
    suite = RewardSuite(lying, CPU, 8.0)
    suite.require_differentiable()
    with pytest.raises(RewardError, match=r"'lying' on .*without a gradient"):
        backward(replace(objective, suite=suite), chunks)
