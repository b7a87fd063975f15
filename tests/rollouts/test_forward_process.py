"""AWM and NFT: losses on final videos, their gradients, and updates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bpgo_video.config.bpgo import Config, LossConfig
from bpgo_video.diffusion.flow_matching import matching_error
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import GroupAdvantages, LossAdvantages
from bpgo_video.policies import Policy, load_policy
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.forward_process import ForwardProcess, VelocityMatch, awm_loss, nft_error, nft_loss
from bpgo_video.rollouts.replay import OBJECTIVES
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import sampled_steps
from bpgo_video.rollouts.updates import Reference, optimise
from bpgo_video.types import PromptBatch, Trajectory
from tests.rollouts.test_replay import PlainLearner, total_loss

SHAPE = (3, 1, 1, 1, 2)
SETTINGS, ZETA = LossConfig(clip_range=(0.2, 0.2), nft_beta=0.5, advantage_clip=2.0), 0.5
PUBLISHED = replace(SETTINGS, nft_adaptive=True, nft_rescale=True)
SIGMA = torch.tensor(0.5)  # of losses that do not depend on it


def row(*values: float) -> torch.Tensor:
    """One sample of two latent dimensions."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, 1, 2)


def test_nft_equals_values_computed_by_hand() -> None:
    # beta .5, old (0, 0), v (1, 0), target (1, 1): v+ = (.5, 0), v- = (-.5, 0)
    match = VelocityMatch(row(1, 0), row(0, 0), row(1, 1), SIGMA)
    better, worse = (0.25 + 1) / 2, (2.25 + 1) / 2
    for advantage, optimality in ((0.0, 0.5), (1.0, 0.75), (-1.0, 0.25), (2.0, 1.0), (9.0, 1.0), (-9.0, 0.0)):
        found = nft_error(match, torch.tensor([advantage], dtype=torch.float64), SETTINGS)
        assert found.item() == pytest.approx(optimality * better + (1 - optimality) * worse)


def test_the_on_policy_gradient_of_nft_is_the_advantage_times_the_target_difference() -> None:
    rng = torch.Generator().manual_seed(0)
    old, target = (torch.randn(SHAPE, generator=rng, dtype=torch.float64) for _ in range(2))
    velocity = old.clone().requires_grad_()
    advantage = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
    nft_error(VelocityMatch(velocity, old, target, SIGMA), advantage, SETTINGS).sum().backward()
    weight = SETTINGS.nft_beta * (advantage / SETTINGS.advantage_clip).view(3, 1, 1, 1, 1)
    torch.testing.assert_close(velocity.grad, weight * 2 * (old - target) / 2)


def test_the_published_nft_equals_values_computed_by_hand() -> None:
    """As above at sigma .5: clean errors of v+ are (.25, .5), of v- (.75, .5); divided by their means .375 and .625."""
    match = VelocityMatch(row(1, 0), row(0, 0), row(1, 1), torch.tensor([0.5]))
    better, worse = (0.0625 + 0.25) / 2 / 0.375, (0.5625 + 0.25) / 2 / 0.625
    found = nft_error(match, torch.tensor([1.0], dtype=torch.float64), PUBLISHED)
    assert found.item() == pytest.approx(2.0 / 0.5 * (0.75 * better + 0.25 * worse))
    exact = VelocityMatch(row(1, 1), row(1, 1), row(1, 1), torch.tensor([0.5]))
    assert nft_error(exact, torch.zeros(1), PUBLISHED).item() == 0, "no error is divided by at least 1e-5, not by 0"


@pytest.mark.parametrize("limit", [2.0, 5.0])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_rescaled_on_policy_gradient_depends_on_neither_beta_nor_the_clip(beta: float, limit: float) -> None:
    """It is the advantage times the gradient of the clean video's squared error over its constant absolute error."""
    rng = torch.Generator().manual_seed(3)
    old, target = (torch.randn(SHAPE, generator=rng, dtype=torch.float64) for _ in range(2))
    sigma, advantage = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), torch.tensor([1.0, -0.5, 1.5]).double()
    velocity = old.clone().requires_grad_()
    settings = replace(PUBLISHED, nft_beta=beta, advantage_clip=limit)
    nft_error(VelocityMatch(velocity, old, target, sigma), advantage, settings).sum().backward()
    size = sigma * (old - target).abs().flatten(1).mean(dim=1)
    weight = (advantage * sigma**2 / size).view(3, 1, 1, 1, 1)
    torch.testing.assert_close(velocity.grad, weight * 2 * (old - target) / 2)


def test_the_on_policy_gradient_of_awm_is_that_of_weighted_matching() -> None:
    rng = torch.Generator().manual_seed(1)
    old, target = (torch.randn(SHAPE, generator=rng, dtype=torch.float64) for _ in range(2))
    advantage, contrastive = (torch.randn(3, generator=rng, dtype=torch.float64) for _ in range(2))
    velocity, plain = old.clone().requires_grad_(), old.clone().requires_grad_()
    awm_loss(
        VelocityMatch(velocity, old, target, SIGMA), LossAdvantages(advantage, contrastive), ZETA, SETTINGS
    ).value.backward()
    ((advantage + 0.5 * contrastive) * matching_error(plain, target)).mean().backward()
    torch.testing.assert_close(velocity.grad, plain.grad)


@pytest.mark.parametrize("loss", [awm_loss, nft_loss])
def test_gradients_equal_finite_differences(loss: Any) -> None:
    rng = torch.Generator().manual_seed(2)
    old, target, base, way = (torch.randn(SHAPE, generator=rng, dtype=torch.float64) for _ in range(4))
    own = LossAdvantages(*(torch.randn(3, generator=rng, dtype=torch.float64) for _ in range(2)))
    wide = replace(SETTINGS, clip_range=(0.9, 9.0))

    def value(theta: torch.Tensor) -> torch.Tensor:
        return loss(VelocityMatch(old + 0.01 * base + theta * way, old, target, SIGMA), own, ZETA, wide).value

    theta = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(value(theta), theta)[0].item()
    assert gradient == pytest.approx(float((value(theta + 1e-6) - value(theta - 1e-6)).detach()) / 2e-6, rel=1e-6)


@pytest.fixture
def fresh_policy(recipe: Config) -> Policy:
    return load_policy(recipe.policy.folder, max_sequence_length=16)


def rollout(policy: Policy, recipe: Config, kind: str) -> tuple[ForwardProcess, list[Trajectory]]:
    sampler = replace(recipe.sampler, num_steps=4, train_steps="all", share_steps="batch")
    recipe = replace(recipe, sampler=sampler, loss=replace(recipe.loss, objective=kind, clip_range=(0.9, 9.0)))
    texts = ("a red circle moving left", "a blue object")
    prompts = PromptBatch(torch.tensor([1, 2]), texts, policy.encode(texts), policy.encode([""]))
    chunks = sample_chunks(
        training_denoiser(policy, recipe), prompts, Mesh(0, 1, torch.device("cpu")), group_size=4,
        micro_batch_size=4, latent_shape=policy.latent_shape(recipe.video), key=(0, "rollout", 0),
        trained_steps=sampled_steps(policy, recipe, 0),
    )  # fmt: skip
    advantage = torch.tensor([[1.0, -1.0, 0.5, -0.5], [0.2, -0.2, 1.5, -1.5]])
    advantages = GroupAdvantages(advantage, advantage.flip(1), torch.tensor([1.2, 0.8]), {})
    trajectories = [trajectory for chunk in chunks for trajectory in chunk.trajectories]
    return OBJECTIVES[kind](policy, recipe, prompts, advantages, 0, torch.device("cpu")), trajectories


@pytest.mark.parametrize("kind", ["awm", "nft"])
@pytest.mark.parametrize("updates", [1, 3])
def test_an_update_lowers_its_loss(fresh_policy: Policy, recipe: Config, kind: str, updates: int) -> None:
    objective, trajectories = rollout(fresh_policy, recipe, kind)
    assert all(trajectory.latents.shape[1] == 1 for trajectory in trajectories), "only final latents are stored"
    objective.prepare(trajectories, 2)
    before = total_loss(objective, trajectories)
    fresh = replace(objective, recorded={})
    learner = PlainLearner(fresh_policy.transformers["transformer"], learning_rate=1e-3)
    metrics = optimise(learner, fresh, trajectories, updates_per_rollout=updates).metrics
    assert metrics["ratio_error_first_update_max"] == 0.0
    assert (metrics["log_ratio_abs_max"] > 1e-7) == (updates > 1), "the policy has changed before later updates"
    assert total_loss(objective, trajectories) < before


def perturb(policy: Policy, factor: float) -> None:
    with torch.no_grad():
        for parameter in policy.transformers["transformer"].parameters():
            parameter.mul_(factor)


@pytest.mark.parametrize("levels", ["schedule", "uniform", "logit_normal"])
def test_a_step_as_published_has_the_loss_and_gradient_of_the_papers_equations(
    fresh_policy: Policy, policy: Policy, recipe: Config, levels: str
) -> None:
    """Sample by sample, on predicted clean videos; the old policy, which sampled, differs from the trained one."""
    beta, limit, zeta = 0.3, 2.0, recipe.bpgo.zeta
    changes: dict[str, Any] = {"nft_beta": beta, "advantage_clip": limit, "nft_adaptive": True, "nft_rescale": True}
    loss = replace(recipe.loss, noise_levels=levels, old_decay=0.5, **changes)
    objective, trajectories = rollout(policy, replace(recipe, loss=loss), "nft")
    perturb(fresh_policy, 1.002)
    objective = replace(objective, policy=fresh_policy, reference=Reference(policy))
    objective.prepare(trajectories, updates_per_rollout=1)
    cases = [(trajectory, index) for trajectory in trajectories for index in objective.passes(trajectory)]
    transformer = fresh_policy.transformers["transformer"]
    found = torch.stack([objective.loss(*case).value for case in cases]).mean()
    found_gradient = torch.autograd.grad(found, list(transformer.parameters()))

    expected, drawn = torch.zeros(()), []
    for trajectory, index in cases:
        noised = objective.noised(trajectory, index, trajectory.sample_index)
        for i, (prompt, sample) in enumerate(zip(trajectory.prompt_rows, trajectory.sample_index, strict=True)):
            x0 = trajectory.latents[i : i + 1, -1].float()
            t, noise = noised.sigma.expand(len(trajectory))[i], noised.target[i : i + 1] + x0
            drawn.append(float(t))
            x_t = (1 - t) * x0 + t * noise
            conditioning = {name: value[[int(prompt)]] for name, value in objective.prompts.conditioning.items()}
            v = fresh_policy.velocity(x_t, t, conditioning)
            with torch.no_grad():
                v_old = policy.velocity(x_t, t, conditioning)
            plus, minus = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
            sizes = [(x_t - t * side - x0).abs().mean().detach() for side in (plus, minus)]
            errors = [
                (x_t - t * side - x0).square().mean() / size for side, size in zip((plus, minus), sizes, strict=True)
            ]
            assert objective.advantages.contrastive is not None
            own, other = (
                each[prompt, sample] for each in (objective.advantages.advantage, objective.advantages.contrastive)
            )
            for weight, advantage in ((1.0, own), (zeta, other)):
                r = 0.5 + 0.5 * max(-1.0, min(1.0, float(advantage) / limit))
                expected = expected + weight * limit / beta * (r * errors[0] + (1 - r) * errors[1])
    expected = expected / len(drawn)
    assert len(set(drawn)) == (len(objective.passes(trajectories[0])) if levels == "schedule" else len(drawn))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for one, other in zip(found_gradient, torch.autograd.grad(expected, list(transformer.parameters())), strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


def test_drawn_levels_depend_on_the_sample_alone_and_stay_with_the_transformer_of_their_step(
    policy: Policy, recipe: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = replace(recipe.loss, noise_levels="uniform")
    objective, trajectories = rollout(policy, replace(recipe, loss=loss), "awm")
    steps = objective.passes(trajectories[0])
    monkeypatch.setattr(type(policy), "transformer_at", lambda self, sigma: "high" if sigma > 0.8 else "low")
    for trajectory in trajectories:
        for index in steps:
            levels = objective.noised(trajectory, index, trajectory.sample_index).sigma
            half = trajectory.part(slice(2, None))
            assert torch.equal(objective.noised(half, index, half.sample_index).sigma, levels[2:])
            assert bool(((levels > 0.8) == (objective.denoiser.sigmas[index] > 0.8)).all())
    assert len({bool(objective.denoiser.sigmas[index] > 0.8) for index in steps}) == 2, "steps of both transformers"
