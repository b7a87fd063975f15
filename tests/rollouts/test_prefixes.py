"""Shared prefixes: the latents are those without sharing, the ratio stays exact, and ranks run equal forwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpgo_video.config.bpgo import Config, VideoConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import Denoiser, training_denoiser
from bpgo_video.rollouts.paths import PartialPath
from bpgo_video.rollouts.prefixes import branches, micro_batches, rows_of_ranks, spreads
from bpgo_video.rollouts.replay import policy_shift
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.types import PromptBatch, Trajectory

CPU = torch.device("cpu")
ALONE = Mesh(0, 1, CPU)
KEY = (0, "rollout", 3)
VIDEO = VideoConfig(9, 64, 64, 8.0)
TEXTS = ("a red circle moving left", "a blue object", "a green square moving up", "a red object")
NUM_STEPS = 5
ALIKE = dict.fromkeys(range(4), (2, 3))  # prompt id -> its stochastic steps
OWN = {0: (2, 3), 1: (0, 3), 2: (3,), 3: (1, 2)}

Steps = dict[int, tuple[int, ...]]
Forwards = list[tuple[int, int]]  # (denoising step, samples) of each


def prompts_of(policy: Policy, count: int) -> PromptBatch:
    negative, rows = policy.encode(["", "a green square"]), torch.arange(count) % 2
    return PromptBatch(torch.arange(count), TEXTS[:count], policy.encode(TEXTS[:count]), negative, rows)


def denoiser_of(policy: Policy, recipe: Config, **sampler: Any) -> Denoiser:
    return training_denoiser(policy, replace(recipe, sampler=replace(recipe.sampler, num_steps=NUM_STEPS, **sampler)))


def shared(
    denoiser: Denoiser, prompts: PromptBatch, steps: Steps, group_size: int, size: int, mesh: Mesh = ALONE
) -> list[Trajectory]:
    """The trajectories of a rank."""
    chunks = sample_chunks(
        denoiser, prompts, mesh, group_size=group_size, micro_batch_size=size, key=KEY,
        latent_shape=denoiser.policy.latent_shape(VIDEO), trained_steps=steps.__getitem__, same_start=True,
    )  # fmt: skip
    return [trajectory for chunk in chunks for trajectory in chunk.trajectories]


def unshared(denoiser: Denoiser, prompts: PromptBatch, trajectory: Trajectory) -> Trajectory:
    """The same samples, each denoised from its noise on."""
    rows, samples, steps = trajectory.prompt_rows, trajectory.sample_index, trajectory.trained_steps
    ids, shape = prompts.ids[rows].tolist(), trajectory.latents.shape[2:]
    own = list(zip(ids, samples.tolist(), strict=True))
    start = keyed_noise(shape, [(*KEY, prompt, 0, "start") for prompt in ids], CPU)

    def noise_of(step: int) -> torch.Tensor:
        return keyed_noise(shape, [(*KEY, *sample, step) for sample in own], CPU)

    return Trajectory(rows, samples, steps, *denoiser.denoise(start, guidance_of(prompts, rows, CPU), noise_of, steps))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    """Every forward from here on."""
    found: Forwards = []
    transition, ode_velocity = Denoiser.transition, Denoiser.ode_velocity

    def stochastic(self: Denoiser, latents: torch.Tensor, index: int, guidance: Any) -> Any:
        found.append((index, len(latents)))
        return transition(self, latents, index, guidance)

    def deterministic(self: Denoiser, path: PartialPath, guidance: Any) -> Any:
        found.append((path.step, len(path.latents)))
        return ode_velocity(self, path, guidance)

    monkeypatch.setattr(Denoiser, "transition", stochastic)
    monkeypatch.setattr(Denoiser, "ode_velocity", deterministic)
    return found


@pytest.mark.parametrize(
    ("sampler", "records"),
    [
        ({}, {}),
        ({"latents_dtype": "bfloat16"}, {}),
        ({"solver": "adams_bashforth"}, {}),
        ({"guidance_scale": 3.0, "solver": "adams_bashforth"}, {"records_means": True, "records_frames": True}),
        ({"guidance_scale": 3.0}, {"guidance_every": 2}),
        ({}, {"records_path": False}),
    ],
    ids=["fp32", "bf16", "second_order", "guided_and_recorded", "guided_every_other_step", "only_the_end"],
)
@pytest.mark.parametrize("steps", [ALIKE, OWN], ids=["alike", "own"])
def test_with_batches_of_one_shape_sharing_changes_no_bit(
    policy: Policy, recipe: Config, forwards: Forwards, sampler: dict[str, Any], records: dict[str, Any], steps: Steps
) -> None:
    denoiser, prompts = replace(denoiser_of(policy, recipe, **sampler), **records), prompts_of(policy, 4)
    found = shared(denoiser, prompts, steps, group_size=4, size=4)
    first = [min(steps[row]) for row in range(4)]
    assert len(forwards) == max(first) + sum(NUM_STEPS - step for step in first)
    assert len(found) == 4
    for trajectory in found:
        expected = unshared(denoiser, prompts, trajectory)
        for name in ("latents", "log_probs", "means", "frame_log_probs"):
            one, other = getattr(trajectory, name), getattr(expected, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), name


@pytest.mark.parametrize("prompts", [1, 3])
def test_the_ratio_is_one_whatever_the_shape_of_the_prefixes(policy: Policy, recipe: Config, prompts: int) -> None:
    denoiser, batch = (
        denoiser_of(policy, recipe, solver="adams_bashforth", guidance_scale=3.0),
        prompts_of(policy, prompts),
    )
    trajectories = shared(denoiser, batch, OWN, group_size=4, size=2)
    assert len(trajectories) == 2 * prompts
    for trajectory in trajectories:
        guidance = guidance_of(batch, trajectory.prompt_rows, CPU)
        for index in trajectory.trained_steps:
            transition = denoiser.transition(trajectory.latents[:, index], index, guidance)
            assert torch.equal(policy_shift(trajectory, index, transition).log_ratio, torch.zeros(2))
        torch.testing.assert_close(trajectory.latents, unshared(denoiser, batch, trajectory).latents, rtol=0, atol=5e-5)


def test_nothing_is_computed_before_a_first_step_that_is_stochastic(
    policy: Policy, recipe: Config, forwards: Forwards
) -> None:
    shared(denoiser_of(policy, recipe), prompts_of(policy, 2), dict.fromkeys(range(2), (0, 2)), 4, 4)
    assert forwards == 2 * [(step, 4) for step in range(NUM_STEPS)]


def test_without_stochastic_steps_everything_is_shared(policy: Policy, recipe: Config, forwards: Forwards) -> None:
    found = shared(denoiser_of(policy, recipe), prompts_of(policy, 2), dict.fromkeys(range(2), ()), 4, 4)
    assert forwards == [(step, 2) for step in range(NUM_STEPS)]
    for trajectory in found:
        assert trajectory.latents.shape[1] == NUM_STEPS + 1
        assert torch.equal(trajectory.latents, trajectory.latents[:1].expand_as(trajectory.latents))
        assert trajectory.log_probs.isnan().all()


@pytest.mark.parametrize("sequence", [1, 2])
def test_every_rank_runs_the_same_forwards(policy: Policy, recipe: Config, forwards: Forwards, sequence: int) -> None:
    """Of three ranks the second has samples of both prompts, and needs two prefixes; the others repeat their one.

    All branch off at step 2, where the first prompt's samples go on by the ODE, from the prefix's last velocity.
    """
    denoiser, prompts = denoiser_of(policy, recipe, solver="adams_bashforth"), prompts_of(policy, 2)
    steps: Steps = {0: (3,), 1: (2, 3)}
    alone = shared(denoiser, prompts, steps, 5, 1)
    by_rank, sampled = [], []
    for rank in range(3 * sequence):
        forwards.clear()
        sampled.append(shared(denoiser, prompts, steps, 5, 1, Mesh(rank, 3 * sequence, CPU, sequence)))
        by_rank.append([index for index, _ in forwards])
    assert all(one == 2 * [0, 1] + 4 * [2, 3, 4] for one in by_rank)
    together = [trajectory for of_rank in sampled[::sequence] for trajectory in of_rank]
    for one, other in zip(alone, together[: len(alone)], strict=True):  # the last rank repeats its last sample
        assert torch.equal(one.latents, other.latents), "all batches have one sample"


def test_a_diffusers_scheduler_cannot_be_shared(policy: Policy, recipe: Config) -> None:
    denoiser = replace(denoiser_of(policy, recipe), scheduler=policy.pipeline.scheduler)
    with pytest.raises(ValueError, match="not a diffusers scheduler"):
        shared(denoiser, prompts_of(policy, 2), OWN, 4, 4)


def test_a_path_beyond_its_stochastic_steps_is_refused(policy: Policy, recipe: Config) -> None:
    denoiser, guidance = denoiser_of(policy, recipe), guidance_of(prompts_of(policy, 1), torch.tensor([0]), CPU)
    noise = keyed_noise(policy.latent_shape(VIDEO), [("noise", 0)], CPU)
    path = denoiser.follow_ode(denoiser.begin(noise), guidance)
    with pytest.raises(ValueError, match=r"at step 1, beyond its stochastic steps \[0\]"):
        denoiser.complete(path, guidance, lambda _: noise, (0, 2))


@given(
    first_steps=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    world=st.integers(1, 6),
    sequence=st.sampled_from([1, 2]),
    group_size=st.integers(1, 6),
    size=st.integers(1, 4),
)
@settings(max_examples=200)
def test_branches_suit_every_rank(
    first_steps: list[int], world: int, sequence: int, group_size: int, size: int
) -> None:
    """No sample branches off after its first stochastic step, none lacks its prefix, and nothing costs more."""
    meshes = [Mesh(rank, world * sequence, CPU, sequence) for rank in range(world * sequence)]
    for spread in {False, spreads(meshes[0], group_size, size)}:
        planned = [branches(first_steps, mesh, group_size, size, spread=spread) for mesh in meshes]
        shares = rows_of_ranks(len(first_steps), meshes[0], group_size, size, spread)
        everywhere = [reach for found in planned for reach in zip(found.batches, found.ends, strict=True)]
        for mesh, found in zip(meshes, planned, strict=True):
            assert (found.steps, found.ends) == (planned[0].steps, planned[0].ends)
            assert len(found.batches) == len(found.ends)
            assert all(len(rows) <= size for rows in found.batches)
            received = everywhere if spread else list(zip(found.batches, found.ends, strict=True))
            for rows, step in zip(shares[mesh.data_rank], found.steps, strict=True):
                assert all(step <= first_steps[row] for row in rows)
                for row in rows:
                    assert any(row in batch and step <= end for batch, end in received)
                    assert (row, step) in found.wanted
            assert sum(found.ends) <= sum(found.steps), "at most as many forwards as without prefixes"
        if spread or (world == 1 and group_size % size == 0):
            assert planned[0].steps == [first_steps[rows[0]] for rows in shares[0]], "each branches off latest"


@given(
    prompts=st.integers(1, 5),
    ranks=st.integers(1, 4),
    sequence=st.sampled_from([1, 2]),
    each=st.integers(1, 3),
    size=st.integers(1, 3),
)
def test_a_spread_group_has_each_sample_once(prompts: int, ranks: int, sequence: int, each: int, size: int) -> None:
    group_size = ranks * each * size
    meshes = [Mesh(rank, ranks * sequence, CPU, sequence) for rank in range(0, ranks * sequence, sequence)]
    assert spreads(meshes[0], group_size, size) is (ranks > 1)
    batches = [batch for mesh in meshes for batch in micro_batches(mesh, prompts, group_size, size, spread=True)]
    assert sorted(item for batch in batches for item in batch) == list(range(prompts * group_size))
    assert all(len(batch) == size and len({item // group_size for item in batch}) == 1 for batch in batches)
