"""Evaluation on held-out prompts: random generators are restored, and each displayed video is written once."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from bpgo_video.config.bpgo import Config, ConfigError, EmaConfig, EvaluationConfig, RewardConfig
from bpgo_video.config.rules import check
from bpgo_video.data.media import read_video
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.randomness import FixedDraws, isolated, keyed_noise
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.training.heldout import HeldoutScores, ShownVideos, evaluate, look_summary
from bpgo_video.types import PromptBatch, RolloutChunk


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_draws_inside_do_not_change_the_generators() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with isolated():
        inside = draws()
        torch.manual_seed(7)
    assert inside == expected, "the block continues from the generators' state"
    assert draws() == expected
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), isolated():
        _ = torch.rand(()) / 0 + 1 // 0
    assert torch.equal(torch.get_rng_state(), state), "also if the block raises"


def test_fixed_draws_are_reproducible_and_do_not_affect_other_threads() -> None:
    state = torch.random.get_rng_state()
    drawn, elsewhere = [], []
    for _ in range(2):
        with FixedDraws():
            thread = Thread(target=lambda: elsewhere.append(torch.randn(3)))
            thread.start()
            thread.join()
            drawn.append(torch.cat([torch.randn(3), torch.rand(2), torch.randn(3)]))
            own = torch.randn(3, generator=torch.Generator().manual_seed(5))
        assert torch.equal(own, torch.randn(3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][:3], drawn[0][5:])
    torch.random.set_rng_state(state)
    assert torch.equal(torch.cat(elsewhere), torch.cat([torch.randn(3), torch.randn(3)]))


def test_a_single_video_has_no_standard_error() -> None:
    assert HeldoutScores({"oracle": torch.tensor([[0.5]])}).metrics() == {"heldout/oracle": 0.5}
    both = HeldoutScores({"oracle": torch.tensor([[0.25], [0.75]])}).metrics()
    assert both == {"heldout/oracle": 0.5, "heldout/oracle_stderr": pytest.approx(0.25)}


@pytest.mark.parametrize(("gain", "drift"), [(0.2, 2.0), (0.0, 0.0), (-0.1, -1.0)])
def test_a_drift_of_the_look_is_in_deviations_of_the_videos_before_training(gain: float, drift: float) -> None:
    before = 0.1 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    before = 0.1 * (before - before.mean()) / before.std() + 0.5
    after = HeldoutScores({}, look={"look/brightness": before + gain, "look/contrast": before})
    found = look_summary({"look/brightness": before.tolist()}, after)
    assert found == {
        "look/brightness": {
            "before": pytest.approx(0.5), "after": pytest.approx(0.5 + gain), "drift": pytest.approx(drift, rel=1e-4)
        }
    }  # fmt: skip
    assert after.metrics() == {"look/brightness": pytest.approx(0.5 + gain), "look/contrast": pytest.approx(0.5)}
    assert after.metrics("heldout_ema") == {}


def test_a_drift_that_few_prompts_cannot_show_is_none() -> None:
    """Four prompts have p >= 2 / 2^4."""
    before = torch.rand(4, 1, generator=torch.Generator().manual_seed(0))
    found = look_summary({"look/clipped": before.tolist()}, HeldoutScores({}, look={"look/clipped": before + 9}))
    assert found["look/clipped"]["drift"] == 0.0


def test_raw_and_averaged_weights_are_measured_and_the_raw_ones_decide(recipe: Config) -> None:
    assert [EvaluationConfig(weights=kind).measured for kind in ("raw", "ema", "both")] == [
        ("raw",),
        ("ema",),
        ("raw", "ema"),
    ]
    both = replace(recipe, evaluation=replace(recipe.evaluation, weights="both"))
    with pytest.raises(ConfigError, match=r"evaluation\.weights is 'both' with ema\.decay = 0"):
        check(both)
    check(replace(both, ema=EmaConfig(decay=0.99)))
    scores = HeldoutScores({"oracle": torch.tensor([[0.0, 1.0]])})
    assert scores.metrics("heldout_ema").keys() == {"heldout_ema/oracle", "heldout_ema/oracle_stderr"}


def test_the_evaluation_schedule_defaults_to_that_of_the_sampler(recipe: Config) -> None:
    sampler = replace(recipe.sampler, shift=3.0)
    assert EvaluationConfig().shift_or(sampler) == 3.0
    assert EvaluationConfig(shift=5.0).shift_or(sampler) == 5.0
    assert EvaluationConfig().shift_or(recipe.sampler) is None


@torch.no_grad()
def test_held_out_videos_follow_the_solver_and_the_shift(policy: Policy, recipe: Config) -> None:
    """Euler equals diffusers' loop over the shifted schedule; the second-order solver gives different videos."""
    video = replace(recipe.video, num_frames=5, height=32, width=32)
    base = replace(recipe, video=video, rollout=replace(recipe.rollout, micro_batch_size=1))
    embeds = policy.encode(["a red circle moving left"])
    prompts = PromptBatch(torch.tensor([7]), ("a red circle moving left",), embeds)
    start = keyed_noise(policy.latent_shape(video), [(base.run.seed, "heldout", 7, 0, "start")], "cpu")

    def sampled(solver: str) -> torch.Tensor:
        settings = {"solver": solver, "shift": 4.0, "num_steps": 3, "samples_per_prompt": 1}
        config = replace(base, evaluation=replace(base.evaluation, **settings))
        seen: list[RolloutChunk] = []
        suite = RewardSuite({"flicker": RewardConfig(model="temporal_flickering")}, torch.device("cpu"), video.fps)
        evaluate(policy, prompts, suite, config, Mesh(0, 1, torch.device("cpu")), seen.append)
        assert seen[0].trajectories[0].latents.shape[1] == 1, "an evaluation keeps only the last noise level"
        return seen[0].trajectories[0].latents[:, -1]

    schedule = FlowMatchEulerDiscreteScheduler(shift=4.0)
    schedule.set_timesteps(3)
    latents = start
    for sigma, timestep in zip(schedule.sigmas, schedule.timesteps, strict=False):
        latents = schedule.step(policy.velocity(latents, sigma, embeds), timestep, latents, return_dict=False)[0]
    assert torch.allclose(sampled("euler"), latents, atol=1e-5)
    assert not torch.allclose(sampled("adams_bashforth"), latents, atol=1e-3)


def test_the_first_samples_of_evenly_spaced_prompts_are_written(recipe: Config, tmp_path: Path) -> None:
    """Of five prompts with two samples, three are displayed: 0, 2 and 4, for any order and repetition of chunks."""
    config = replace(recipe, evaluation=replace(recipe.evaluation, samples_per_prompt=2, videos=3))
    rows, samples = torch.tensor([4, 4, 0, 0, 2, 1, 3]), torch.tensor([0, 1, 0, 0, 0, 0, 1])
    grey = (rows / 8 + samples / 16)[:, None, None, None, None].expand(-1, 5, 3, 16, 16)
    write = ShownVideos(tmp_path, ["a prompt"] * 5, config).writer("after")
    for start in (0, 3):
        part = slice(start, start + 4)
        write(RolloutChunk((), grey[part], rows[part], samples[part]))
    shades = [float(read_video(path)[0].mean()) for path in sorted((tmp_path / "after").glob("*.mp4"))]
    assert shades == pytest.approx([0.0, 0.25, 0.5], abs=0.02)
