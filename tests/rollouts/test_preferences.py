"""DPO on the embedded policy: its first loss, its gradient, and the pairs of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.preferences import Posterior
from bpgo_video.policies import Policy, load_policy
from bpgo_video.rollouts.preferences import Preferences, final_latents
from bpgo_video.rollouts.updates import Reference, optimise
from bpgo_video.types import Trajectory
from tests.rollouts.test_forward_process import rollout
from tests.rollouts.test_replay import PlainLearner, total_loss

ALONE = Mesh(0, 1, torch.device("cpu"))


@pytest.fixture
def fresh_policy(recipe: Config) -> Policy:
    return load_policy(recipe.policy.folder, max_sequence_length=16)


def preferences(
    trained: Policy, reference: Policy, recipe: Config, variance: float = 0.0
) -> tuple[Preferences, Sequence[Trajectory]]:
    """Two pairs of each of two groups of four, in micro-batches of two pairs."""
    recipe = replace(recipe, loss=replace(recipe.loss, dpo_pairs=2, dpo_beta=300.0))
    objective, trajectories = rollout(trained, recipe, "dpo")
    assert isinstance(objective, Preferences)
    posterior = Posterior(objective.advantages.advantage.double(), torch.tensor([variance, 0.0]).double())
    advantages = replace(objective.advantages, posterior=posterior)
    return replace(objective, advantages=advantages, reference=Reference(reference)).arranged(trajectories, ALONE)


def test_the_first_loss_is_log_2_and_updates_prefer_the_winners(
    fresh_policy: Policy, policy: Policy, recipe: Config
) -> None:
    objective, batches = preferences(fresh_policy, policy, recipe, variance=0.7)
    for batch in batches:
        for index in objective.passes(batch):
            found = objective.loss(batch, index)
            assert found.value == torch.tensor(2.0).log(), "the policy is its reference, bit for bit"
            assert found.metrics["preference/reference_distance"] == 0
    before = total_loss(objective, batches)
    learner = PlainLearner(fresh_policy.transformers["transformer"], learning_rate=1e-3)
    metrics = optimise(learner, objective, batches, updates_per_rollout=3).metrics
    assert "ratio_error_first_update_max" not in metrics
    assert total_loss(objective, batches) < before
    assert all(objective.loss(batch, 0).metrics["preference/accuracy"] == 1 for batch in batches)


def test_the_gradient_equals_that_of_dpo_written_out_pair_by_pair(
    fresh_policy: Policy, policy: Policy, recipe: Config
) -> None:
    """Both videos of a pair have the noise of the winner; the policy differs from its reference."""
    transformer = fresh_policy.transformers["transformer"]
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.001)
    objective, batches = preferences(fresh_policy, policy, recipe, variance=0.7)
    (objective.loss(batches[0], 1).value + objective.loss(batches[1], 1).value).backward()
    found = gradients(transformer)

    def error(of: Policy, clean: Tensor, noise: Tensor, row: int) -> Tensor:
        sigma = objective.denoiser.sigmas[1]
        conditioning = {name: value[[row]] for name, value in objective.prompts.conditioning.items()}
        velocity = of.velocity((1 - sigma) * clean + sigma * noise, sigma, conditioning)
        return (velocity - (noise - clean)).square().mean()

    pairs = [(0, 0, 1, 1.0 + 1.0), (0, 2, 3, 0.5 + 0.5), (1, 2, 3, None), (1, 0, 1, None)]
    clean = final_latents(
        rollout(fresh_policy, recipe, "dpo")[1], {pair[:2] for pair in pairs} | {(p[0], p[2]) for p in pairs}, ALONE
    )
    total = torch.zeros(())
    for row, winner, loser, ahead in pairs:
        one, other = (clean[row, sample][None].float() for sample in (winner, loser))
        batch = next(batch for batch in batches if row in batch.prompt_rows)
        place = next(
            i
            for i in range(0, len(batch), 2)
            if (int(batch.prompt_rows[i]), int(batch.sample_index[i])) == (row, winner)
        )
        assert int(batch.sample_index[place + 1]) == loser
        _, target, _ = objective.noised(batch, 1, batch.sample_index)
        noise = target[[place]] + one
        gain = [error(policy, x, noise, row).detach() - error(fresh_policy, x, noise, row) for x in (one, other)]
        margin = 150.0 * (gain[0] - gain[1])
        p = 1.0 if ahead is None else 0.5 * (1 + math.erf(ahead / math.sqrt(2 * 0.7) / math.sqrt(2)))
        total = total - (p * logsigmoid(margin) + (1 - p) * logsigmoid(-margin)) / 2
    total.backward()
    for one, expected in zip(found, gradients(transformer), strict=True):
        assert (one - expected).norm() <= 1e-4 * expected.norm()


def gradients(transformer: torch.nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in transformer.parameters() if parameter.grad is not None]
    transformer.zero_grad()
    return found


def test_pairs_that_do_not_fill_the_micro_batches_have_the_same_mean(policy: Policy, recipe: Config) -> None:
    """Two ranks with micro-batches of two pairs and three pairs: the last rank has one and a sample against itself."""
    objective, trajectories = rollout(policy, replace(recipe, loss=replace(recipe.loss, dpo_pairs=1)), "dpo")
    assert isinstance(objective, Preferences)
    flat = torch.tensor([[1.0, 0.0, 0.5, 0.2], [0.0, 0.0, 0.0, 0.0]]).double()
    posterior = Posterior(flat, torch.zeros(2).double())
    advantages = replace(objective.advantages, posterior=posterior)
    objective = replace(objective, advantages=advantages, reference=Reference(policy))
    whole, batches = objective.arranged(trajectories, ALONE)
    assert total_loss(whole, batches) == pytest.approx(3 * math.log(2) / 2), "a flat group has no pair"
    four = [trajectories[0], trajectories[1]]
    uneven = replace(objective, advantages=replace(advantages, posterior=Posterior(flat[:1], torch.zeros(1).double())))
    filled, batches = uneven.arranged(four, ALONE)
    assert filled.scale == 2.0
    assert batches[0].sample_index.tolist() == [0, 1, 0, 0]
    assert total_loss(filled, batches) == pytest.approx(3 * math.log(2))


def test_kto_starts_at_utility_one_half_and_moves_each_sample_to_its_side(
    fresh_policy: Policy, policy: Policy, recipe: Config
) -> None:
    """At the reference the gradient is that of the matching error of each sample, times -w sign(A) beta/8."""
    recipe = replace(recipe, loss=replace(recipe.loss, dpo_beta=300.0))
    objective, batches = rollout(fresh_policy, recipe, "kto")
    objective = replace(objective, reference=Reference(policy))
    transformer = fresh_policy.transformers["transformer"]
    for batch in batches:
        found = objective.loss(batch, 1)
        assert found.metrics["preference/utility"] == 0.5, "the policy is its reference, bit for bit"
        found.value.backward()
    gradient = gradients(transformer)
    expected = torch.zeros(())
    for batch in batches:
        latents, target, sigma = objective.noised(batch, 1, batch.sample_index)
        conditioning = {name: value[batch.prompt_rows] for name, value in objective.prompts.conditioning.items()}
        errors = (fresh_policy.velocity(latents, sigma, conditioning) - target).square().flatten(1).mean(dim=1)
        signs = objective.advantages.advantage[batch.prompt_rows, batch.sample_index].sign()
        weights = objective.advantages.trust[batch.prompt_rows] * signs * 300.0 / 8
        expected = expected + (weights * errors).mean()
    expected.backward()
    for one, other in zip(gradient, gradients(transformer), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()
    before = total_loss(objective, batches)
    optimise(PlainLearner(transformer, learning_rate=1e-3), objective, batches, updates_per_rollout=3)
    assert total_loss(objective, batches) < before
