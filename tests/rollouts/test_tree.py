"""Trees: their samples are those of single paths, transitions are replayed once, and gradients are the leaves'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from bpgo_video.config.bpgo import Config, ConfigError, RolloutConfig
from bpgo_video.config.rules import check_world
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.policies import Policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.forwards import expected_forwards, expected_replays
from bpgo_video.rollouts.replay import Replay
from bpgo_video.rollouts.rollout import chunks_of_rank, sample_chunks
from bpgo_video.rollouts.updates import ratio_error
from bpgo_video.types import RolloutChunk, Trajectory
from tests.rollouts.test_prefixes import Forwards, forwards, prompts_of

__all__ = ["forwards"]
CPU = torch.device("cpu")
KEY = (0, "rollout", 3)
STEPS = {0: (1, 3), 1: (0, 2)}  # prompt id -> its stochastic steps
ALIKE = dict.fromkeys(range(2), (1, 3))


def settings(recipe: Config, branches: tuple[int, ...], size: int = 8, prompts: int = 2, **sampler: Any) -> Config:
    """Two trained steps of five, of groups of eight."""
    changed = {"num_steps": 5, "train_fraction": 0.5, **sampler}
    rollout = {"prompts_per_step": prompts, "group_size": 8, "micro_batch_size": size, "branches": branches}
    return replace(recipe, sampler=replace(recipe.sampler, **changed), rollout=replace(recipe.rollout, **rollout))


def chunks(policy: Policy, config: Config, steps: dict[int, tuple[int, ...]], mesh: Mesh) -> Iterator[RolloutChunk]:
    rollout = config.rollout
    return sample_chunks(
        training_denoiser(policy, config), prompts_of(policy, rollout.prompts_per_step), mesh, key=KEY,
        group_size=rollout.group_size, micro_batch_size=rollout.micro_batch_size, same_start=True,
        latent_shape=policy.latent_shape(config.video), trained_steps=steps.__getitem__, branching=rollout.branches,
    )  # fmt: skip


def sampled(
    policy: Policy, config: Config, steps: dict[int, tuple[int, ...]] = STEPS, mesh: Mesh | None = None
) -> list[Trajectory]:
    found = chunks(policy, config, steps, mesh or Mesh(0, 1, CPU))
    return [trajectory for chunk in found for trajectory in chunk.trajectories]


def objective_of(policy: Policy, config: Config) -> Replay:
    """With advantages that differ in every sample; the second surrogate has the same in another order."""
    advantage = keyed_noise((config.rollout.prompts_per_step, 8), [("advantages",)], CPU)[0]
    advantages = GroupAdvantages(advantage, advantage.flip(1), torch.ones(len(advantage)))
    return Replay(policy, config, prompts_of(policy, config.rollout.prompts_per_step), advantages, 0, CPU)


def gradient(objective: Replay, trajectories: list[Trajectory]) -> list[Tensor]:
    """Of the mean over trees and trained steps, as an update has it."""
    count = sum(len(objective.passes(trajectory)) for trajectory in trajectories)
    for trajectory in trajectories:
        for index in objective.passes(trajectory):
            for part in objective.parts(trajectory, index):
                (objective.loss(part, index).value * len(part) / len(trajectory) / count).backward()
    return taken(objective.policy)


def taken(policy: Policy) -> list[Tensor]:
    transformer = policy.transformers["transformer"]
    found = [parameter.grad.clone() for parameter in transformer.parameters()]
    transformer.zero_grad()
    return found


def below(branches: tuple[int, ...], depth: int) -> int:
    """Samples below an edge of the split number `depth`, for groups of eight."""
    counts = [8]
    for children in branches:
        counts.append(counts[-1] // children)
    return counts[min(depth + 1, len(branches))]


def assert_close(found: list[Tensor], expected: list[Tensor], bound: float = 2e-5) -> None:
    """Norms relative to the largest: tensors whose terms cancel have rounding errors only."""
    largest = max(float(one.norm()) for one in expected)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= bound * max(float(other.norm()), 0.01 * largest)


@pytest.mark.parametrize(
    ("branches", "size", "sampler"),
    [
        ((4, 2), 8, {}),
        ((2, 4), 2, {"solver": "adams_bashforth", "guidance_scale": 3.0}),
        ((8,), 4, {}),
        ((1, 8), 1, {"latents_dtype": "bfloat16"}),
    ],
)
def test_samples_of_a_tree_are_those_of_their_own_paths(
    policy: Policy, recipe: Config, branches: tuple[int, ...], size: int, sampler: dict[str, Any]
) -> None:
    """Each sample alone from the same start, with the noise of the first sample below its edges."""
    config = settings(recipe, branches, size, **sampler)
    denoiser, prompts = training_denoiser(policy, config), prompts_of(policy, 2)
    trajectories = sampled(policy, config)
    assert [trajectory.prompt_rows.unique().tolist() for trajectory in trajectories] == [[0], [1]]
    bound = 0.1 if sampler.get("latents_dtype") else 1e-4
    for prompt, trajectory in enumerate(trajectories):
        assert trajectory.sample_index.tolist() == list(range(8))
        steps = STEPS[prompt]
        for sample in range(8):

            def noise_of(step: int, prompt: int = prompt, sample: int = sample) -> Tensor:
                first = sample - sample % below(branches, STEPS[prompt].index(step))
                return keyed_noise(policy.latent_shape(config.video), [(*KEY, prompt, first, step)], CPU)

            start = keyed_noise(policy.latent_shape(config.video), [(*KEY, prompt, 0, "start")], CPU)
            guidance = guidance_of(prompts, torch.tensor([prompt]), CPU)
            alone = denoiser.denoise(start, guidance, noise_of, steps)
            torch.testing.assert_close(trajectory.latents[sample], alone.latents[0], rtol=0, atol=bound)
        shared = [8, *(below(branches, depth) for depth in range(2))]
        for point in range(6):
            depth = sum(step < point for step in steps)
            assert len(trajectory.latents[:, point].flatten(1).unique(dim=0)) == 8 // shared[depth]


def test_a_tree_that_splits_once_is_todays_rollout(policy: Policy, recipe: Config) -> None:
    """With one sample in each forward no bit changes; in larger batches a node rounds as a batch of its own."""
    for size, bound in ((1, 0.0), (8, 5e-5)):
        today, tree = (settings(recipe, branches, size, prompts=1) for branches in ((), (8,)))
        apart, together = sampled(policy, today), sampled(policy, tree)
        for name in ("latents", "log_probs"):
            one, other = (torch.cat([getattr(part, name) for part in parts]) for parts in (apart, together))
            torch.testing.assert_close(one, other, rtol=0, atol=bound, equal_nan=True)
        losses = []
        for config, parts in ((today, apart), (tree, together)):
            objective = objective_of(policy, config)
            losses.append(sum(
                float(objective.loss(part, index).value.detach()) * len(part)
                for trajectory in parts for index in trajectory.trained_steps
                for part in objective.parts(trajectory, index)
            ))  # fmt: skip
        assert losses[0] == pytest.approx(losses[1], abs=1e-5 if size == 1 else 1e-4)
        assert_close(gradient(objective_of(policy, tree), together), gradient(objective_of(policy, today), apart),
                     bound=2e-5 if size == 1 else 1e-3)  # fmt: skip


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("branches", [(4, 2), (2, 2, 2)])
def test_the_gradient_is_that_of_all_leaves(
    policy: Policy, recipe: Config, branches: tuple[int, ...], rescaled: bool
) -> None:
    """Every leaf replays its whole path, with its edge's advantage divided by the leaves that share it."""
    steps = {0: (0, 1, 3), 1: (1, 2, 3)} if len(branches) == 3 else STEPS
    config = settings(recipe, branches, size=2, train_fraction=len(branches) / 4)
    config = replace(config, advantage=replace(config.advantage, depth_normalise=rescaled))
    trajectories, objective = sampled(policy, config, steps), objective_of(policy, config)
    found = gradient(objective, trajectories)
    denoiser, weights, zeta = objective.denoiser, objective.step_weights, config.bpgo.zeta
    for trajectory in trajectories:
        prompt = int(trajectory.prompt_rows[0])
        leaves = [objective.advantages.advantage[prompt].tolist()]
        leaves.append(leaves[0][::-1])  # A~
        guidance = guidance_of(objective.prompts, trajectory.prompt_rows, CPU)
        for depth, index in enumerate(trajectory.trained_steps):
            count = below(branches, depth)
            edges = [[mean(of[first : first + count]) for first in range(0, 8, count)] for of in leaves]
            if rescaled:
                spreads = [float(torch.tensor(of).std()) for of in leaves]
                edges = [[value * spread / float(torch.tensor(of).std()) for value in of]
                         for of, spread in zip(edges, spreads, strict=True)]  # fmt: skip
            transition = denoiser.transition(trajectory.latents[:, index], index, guidance)
            log_ratio = transition.log_prob(trajectory.latents[:, index + 1]) - trajectory.log_probs[:, index]
            terms = [
                -log_ratio[leaf].exp() * (edges[0][leaf // count] + zeta * edges[1][leaf // count]) / count
                for leaf in range(8)
            ]  # at ratio 1 the clip has no effect
            each = torch.stack(terms).sum() / len(edges[0]) * weights[index]
            (each / len(trajectories) / len(trajectory.trained_steps)).backward()
    assert_close(found, taken(policy), bound=1e-4)


@pytest.mark.parametrize(
    ("branches", "size", "change"),
    [((4, 2), 8, {}), ((2, 4), 3, {"guidance_scale": 3.0}), ((4, 2), 1, {}), ((2, 2, 2), 2, {"train_fraction": 1.0})],
)
def test_the_ratio_is_exactly_one_and_each_node_is_replayed_once(
    policy: Policy, recipe: Config, forwards: Forwards, branches: tuple[int, ...], size: int, change: dict[str, Any]
) -> None:
    config = settings(recipe, branches, size, prompts=1, **change)
    config = replace(config, loss=replace(config.loss, trust_region="divergence_mask"))  # records means, too
    steps = {0: (0, 1, 2, 3)} if change.get("train_fraction") else STEPS
    trajectories, objective = sampled(policy, config, steps), objective_of(policy, config)
    trained = [count for index, count in forwards if index in steps[0]]
    replayed: list[int] = []
    with torch.no_grad():
        for trajectory in trajectories:
            for depth, index in enumerate(objective.passes(trajectory)):
                parts = objective.parts(trajectory, index)
                assert sum(map(len, parts)) == 8
                for part in parts:
                    nodes = part.latents[:, index].flatten(1).unique(dim=0)
                    replayed.append(len(nodes))
                    assert float(ratio_error(objective.loss(part, index).metrics)) == 0.0
                assert sum(replayed[-len(parts) :]) == 8 // (8 if depth == 0 else below(branches, depth - 1))
    assert replayed == trained, "the batches of the rollout"


def test_parts_of_trees_on_two_ranks_are_the_whole_trees(policy: Policy, recipe: Config, forwards: Forwards) -> None:
    """One prompt on two ranks: each has half of its samples, all nodes above them, and half of the gradient's mean."""
    config = settings(recipe, (2, 2, 2), size=2, prompts=1, train_fraction=0.75)
    steps = {0: (0, 1, 3)}
    whole, parts, counts = sampled(policy, config, steps), [], []
    for mesh in (Mesh(rank, 4, CPU, sequence=2) for rank in range(4)):
        forwards.clear()
        parts += sampled(policy, config, steps, mesh)
        counts.append([index for index, _ in forwards])
    assert counts[0] == counts[1] == counts[2] == counts[3]
    assert torch.equal(parts[0].latents, parts[1].latents), "a sequence group samples together"
    torch.testing.assert_close(torch.cat([parts[0].latents, parts[2].latents]), whole[0].latents, rtol=0, atol=5e-5)
    objective = objective_of(policy, config)
    halves = [gradient(objective, [part]) for part in (parts[0], parts[2])]
    means = [(one + other) / 2 for one, other in zip(*halves, strict=True)]
    assert_close(means, gradient(objective, whole), bound=1e-4)


DRAWS = {"random": list(combinations(range(4), 2)), "random_window": [(0, 1), (1, 2), (2, 3)]}


@pytest.mark.parametrize(
    ("selection", "share", "ranks", "size", "branches"),
    [
        ("random", "group", 1, 8, (4, 2)),
        ("random", "group", 1, 2, (2, 4)),
        ("random", "batch", 2, 1, (4, 2)),
        ("random_window", "batch", 4, 2, (2, 4)),
        ("random_window", "group", 2, 8, (4, 2)),
        ("random", "batch", 1, 16, (8,)),
    ],
)
def test_forwards_are_those_that_the_plan_expects(
    policy: Policy, recipe: Config, forwards: Forwards, monkeypatch: pytest.MonkeyPatch, selection: str, share: str,
    ranks: int, size: int, branches: tuple[int, ...],
) -> None:  # fmt: skip
    """The mean over all draws of the samples in forwards, which are equally many on every rank."""
    config = settings(recipe, branches, size, train_steps=selection, share_steps=share)
    check_world(config, ranks)
    monkeypatch.setattr(type(policy), "velocity", lambda self, latents, *_: torch.zeros_like(latents))
    monkeypatch.setattr(type(policy), "decode", lambda self, latents, _: latents.new_zeros(len(latents), 1, 3, 8, 8))
    draws = DRAWS[selection]
    each = [(draw, draw) for draw in draws] if share == "batch" else list(product(draws, repeat=2))
    counted, replayed = [], []
    for draw in each:
        calls = []
        for rank in range(ranks):
            forwards.clear()
            mesh = Mesh(rank, ranks, CPU)
            found = list(chunks(policy, config, dict(enumerate(draw)), mesh))
            calls.append(len(forwards))
            counted.append(sum(count for _, count in forwards) / size)
            assert all(count <= size for _, count in forwards)
            assert len(found) == chunks_of_rank(config.rollout, mesh)
            trajectories = [trajectory for chunk in found for trajectory in chunk.trajectories]
            covered = torch.cat([chunk.prompt_rows * 8 + chunk.sample_index for chunk in found]).tolist()
            assert covered == torch.cat([one.prompt_rows * 8 + one.sample_index for one in trajectories]).tolist()
            objective = objective_of(policy, config)
            nodes = [
                sum(len(part.latents[:, index].flatten(1).unique(dim=0)) for part in objective.parts(one, index))
                for one in trajectories for index in one.trained_steps
            ]  # fmt: skip
            replayed.append(sum(nodes) / size)
        assert len(set(calls)) == 1, "ranks with sharded weights would wait forever"
    assert expected_forwards(config, ranks) == pytest.approx(mean(counted), rel=1e-12)
    assert sum(expected_replays(config, ranks)) == pytest.approx(mean(replayed), rel=1e-12)
    whole = expected_forwards(replace(config, rollout=replace(config.rollout, branches=())), ranks)
    assert expected_forwards(config, ranks) < whole


def test_ranks_whose_trees_would_differ_are_refused(recipe: Config) -> None:
    drawn = settings(recipe, (4, 2), 4)
    check_world(drawn, 1)
    with pytest.raises(ConfigError, match=r"sampler\.share_steps is 'group' with rollout\.branches = \[4, 2\] and "):
        check_world(drawn, 2)
    check_world(settings(recipe, (4, 2), 4, share_steps="batch"), 2)
    check_world(settings(recipe, (4, 2), 4, train_steps="window"), 2)
    uneven = settings(recipe, (2, 3), 1, prompts=1, share_steps="batch")
    uneven = replace(uneven, rollout=replace(uneven.rollout, group_size=6))
    check_world(uneven, 2)
    with pytest.raises(ConfigError, match=r"parts of 2 of the 6 samples .* across branches of \[3\].*multiple of 3"):
        check_world(uneven, 3)


def test_branches_are_off_by_default() -> None:
    assert RolloutConfig().branches == ()
