"""The denoising loop: ODE rollouts equal diffusers', and draws depend only on their keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from bpgo_video.config.bpgo import Config, VideoConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import Denoiser, training_denoiser
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import trained_steps_of
from bpgo_video.types import Guidance, PromptBatch

TEXTS = ("a red circle moving left", "a blue object")
CPU = torch.device("cpu")


VIDEO = VideoConfig(9, 64, 64, 8.0)


def batch(policy: Policy, texts: tuple[str, ...] = TEXTS) -> PromptBatch:
    return PromptBatch(torch.arange(10, 10 + len(texts)), texts, policy.encode(texts), policy.encode([""]))


def euler(policy: Policy, num_steps: int, guidance_scale: float) -> Denoiser:
    sigmas = policy.sigmas(num_steps, VIDEO)
    return Denoiser(policy, sigmas, "ode", 0.0, guidance_scale, torch.float32)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_the_ode_rollout_equals_the_loop_of_the_pipeline(policy: Policy, recipe: Config, guidance_scale: float) -> None:
    latents = keyed_noise(policy.latent_shape(recipe.video), [("noise", i) for i in range(4)], CPU)
    texts = [TEXTS[0]] * 4
    found = euler(policy, 6, guidance_scale).denoise(
        latents,
        Guidance(policy.encode(texts), policy.encode([""] * 4)),
        lambda _: pytest.fail("the ODE draws no noise"),
    )
    path, log_probs = found.latents, found.log_probs
    pipeline = WanPipeline.from_pretrained(policy.folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 6, "max_sequence_length": 16}
    expected = pipeline(
        texts, negative_prompt="", latents=latents, guidance_scale=guidance_scale, output_type="latent", **settings
    ).frames
    torch.testing.assert_close(path[:, -1], expected, rtol=0, atol=1e-5)
    pixels = pipeline(texts, negative_prompt="", latents=latents, guidance_scale=guidance_scale, output_type="pt",
                      **settings).frames  # fmt: skip
    torch.testing.assert_close(policy.decode(path[:, -1], {}), pixels, rtol=0, atol=1e-4)
    assert log_probs.isnan().all()


def test_each_sample_is_guided_away_from_its_negative_prompt(policy: Policy, recipe: Config) -> None:
    """As diffusers' pipeline does with a list of negative prompts."""
    negatives = ["", "a green square moving up"]
    prompts = replace(batch(policy), negative=policy.encode(negatives), negative_rows=torch.tensor([1, 0]))
    latents = keyed_noise(policy.latent_shape(recipe.video), [("noise", i) for i in range(3)], CPU)
    guidance = guidance_of(prompts, torch.tensor([1, 0, 1]), CPU)
    found = euler(policy, 4, 3.0).denoise(latents, guidance, lambda _: latents).latents[:, -1]
    pipeline = WanPipeline.from_pretrained(policy.folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        [TEXTS[1], TEXTS[0], TEXTS[1]], negative_prompt=["", negatives[1], ""], latents=latents, guidance_scale=3.0,
        height=64, width=64, num_frames=9, num_inference_steps=4, max_sequence_length=16, output_type="latent",
    ).frames  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    one = guidance_of(replace(prompts, negative_rows=None), torch.tensor([1, 0, 1]), CPU)
    assert (euler(policy, 4, 3.0).denoise(latents, one, lambda _: latents).latents[1, -1] - found[1]).abs().max() > 1e-3


def test_guidance_without_a_negative_prompt_is_refused(policy: Policy, recipe: Config) -> None:
    latents = keyed_noise(policy.latent_shape(recipe.video), [("noise", 0)], CPU)
    nothing = guidance_of(PromptBatch(torch.tensor([1]), TEXTS[:1], policy.encode(TEXTS[:1])), torch.tensor([0]), CPU)
    assert torch.isfinite(euler(policy, 2, 1.0).velocity(latents, 0, nothing)).all()
    with pytest.raises(ValueError, match=r"guidance_scale is 3.0, but the prompts have no negative prompt"):
        euler(policy, 2, 3.0).velocity(latents, 0, nothing)


def test_trained_steps_are_stochastic_and_the_last_step_is_not(policy: Policy, recipe: Config) -> None:
    denoiser = training_denoiser(policy, recipe)
    chunk = next(sample(denoiser, policy, recipe, Mesh(0, 1, CPU), micro_batch_size=4))
    trained = set(chunk.trajectories[0].trained_steps)
    assert trained
    assert recipe.sampler.num_steps - 1 not in trained
    finite = chunk.trajectories[0].log_probs.isfinite().all(dim=0)
    assert set(finite.nonzero().flatten().tolist()) == trained


def sample(denoiser: Denoiser, policy: Policy, recipe: Config, mesh: Mesh, micro_batch_size: int):
    prompts = batch(policy)
    return sample_chunks(
        denoiser,
        prompts,
        mesh,
        group_size=4,
        micro_batch_size=micro_batch_size,
        latent_shape=policy.latent_shape(recipe.video),
        key=(0, "rollout", 3),
        trained_steps=trained_steps_of(policy, recipe, 3),
    )


def test_samples_do_not_depend_on_their_distribution_over_ranks(policy: Policy, recipe: Config) -> None:
    denoiser = training_denoiser(policy, recipe)
    alone = list(sample(denoiser, policy, recipe, Mesh(0, 1, CPU), 4))
    spread = [next(sample(denoiser, policy, recipe, Mesh(rank, 2, CPU), 4)) for rank in (0, 1)]
    for one, other in zip(alone, spread, strict=True):
        assert torch.equal(one.trajectories[0].latents, other.trajectories[0].latents)
        assert torch.equal(one.trajectories[0].prompt_rows, other.trajectories[0].prompt_rows)
    assert not torch.equal(alone[0].trajectories[0].latents[:, 0], alone[1].trajectories[0].latents[:, 0])


def test_a_group_can_start_from_the_same_noise(policy: Policy, recipe: Config) -> None:
    denoiser, mesh = training_denoiser(policy, recipe), Mesh(0, 1, CPU)
    settings = {"group_size": 2, "micro_batch_size": 4, "latent_shape": policy.latent_shape(recipe.video)}
    chunk = next(
        sample_chunks(
            denoiser,
            batch(policy),
            mesh,
            key=(0, "rollout", 3),
            trained_steps=trained_steps_of(policy, recipe, 3),
            same_start=True,
            **settings,
        )
    )
    start, end = chunk.trajectories[0].latents[:, 0], chunk.trajectories[0].latents[:, -1]
    assert torch.equal(start[0], start[1])
    assert not torch.equal(start[0], start[2]), "different prompts have different noise"
    assert not torch.equal(end[0], end[1]), "samples diverge in the stochastic steps"


def test_uneven_totals_give_every_rank_the_same_number_of_micro_batches() -> None:
    shares = [Mesh(rank, 3, CPU).share(10, 2) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert all(len(items) == 2 for share in shares for items in share)
    flat = [item for share in shares for items in share for item in items]
    assert flat[:10] == list(range(10))
    assert set(flat[10:]) == {9}


def test_latents_are_rounded_for_storage_before_their_log_prob_is_taken(policy: Policy, recipe: Config) -> None:
    rounded = replace(training_denoiser(policy, recipe), latents_dtype=torch.bfloat16)
    chunk = next(sample(rounded, policy, recipe, Mesh(0, 1, CPU), 4))
    path, index = chunk.trajectories[0].latents, chunk.trajectories[0].trained_steps[0]
    assert path.dtype == torch.bfloat16
    guidance = guidance_of(batch(policy), chunk.trajectories[0].prompt_rows, CPU)
    with torch.no_grad():
        transition = rounded.transition(path[:, index], index, guidance)
    assert torch.equal(transition.log_prob(path[:, index + 1]), chunk.trajectories[0].log_probs[:, index])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_sequence_group_divides_the_decoding(policy: Policy, recipe: Config, micro_batch_size: int) -> None:
    """Two ranks with the same trajectories decode complementary halves of the videos."""
    denoiser = training_denoiser(policy, recipe)
    ranks = [
        list(sample(denoiser, policy, recipe, Mesh(rank, 2, CPU, sequence=2), micro_batch_size)) for rank in (0, 1)
    ]
    owners = []
    for mine, other in zip(*ranks, strict=True):
        for one, same in zip(mine.trajectories, other.trajectories, strict=True):
            assert torch.equal(one.latents, same.latents)
        samples = sum(len(trajectory) for trajectory in mine.trajectories)
        assert len(mine.videos) == len(other.videos) == samples // 2
        for chunk in (mine, other):
            owners += list(zip(chunk.prompt_rows.tolist(), chunk.sample_index.tolist(), strict=True))
            latents = {
                (row, index): path
                for trajectory in chunk.trajectories
                for row, index, path in zip(
                    trajectory.prompt_rows.tolist(), trajectory.sample_index.tolist(), trajectory.latents, strict=True
                )
            }
            row, index = int(chunk.prompt_rows[0]), int(chunk.sample_index[0])
            expected = policy.decode(latents[row, index][-1:], {})
            torch.testing.assert_close(chunk.videos[:1], expected, rtol=0, atol=1e-5)
    assert sorted(owners) == [(prompt, index) for prompt in range(2) for index in range(4)]


def test_a_moving_window_is_at_its_first_position_before_training(policy: Policy, recipe: Config) -> None:
    """Priors are measured at step -1, with the same stochastic steps as the first training steps."""
    sampler = replace(recipe.sampler, train_steps="window", share_steps="batch", window_start=1, window_every=2)
    config = replace(recipe, sampler=sampler)
    windows = [trained_steps_of(policy, config, step)(0) for step in (-1, 0, 1, 2)]
    assert windows[0] == windows[1] == windows[2] != windows[3]
