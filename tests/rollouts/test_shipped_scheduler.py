"""Held-out sampling with the pipeline's scheduler: videos equal the pipeline's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDPMScheduler

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import evaluation_denoiser
from tests.families import CASES
from tests.families.case import CPU

STEPS = 4


@pytest.mark.parametrize("name", ["wan", "wan_image", "wan22", "ltx"])
def test_videos_equal_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    case = replace(CASES[name], euler=lambda scheduler: scheduler)
    case.write(tmp_path / "pipeline")
    policy, recipe = case.policy(tmp_path / "pipeline"), case.recipe(tmp_path / "pipeline")
    evaluation = replace(
        recipe.evaluation, solver="shipped", num_steps=STEPS, guidance_scale=case.guidance_scale,
        guidance_scale_2=case.guidance_scale_2,
    )  # fmt: skip
    prompts = case.prompts(policy, recipe)
    denoiser = evaluation_denoiser(policy, replace(recipe, evaluation=evaluation))
    start = torch.randn(2, *policy.latent_shape(case.video), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(2):  # a scheduler is stateful; a denoiser must not be
        path = denoiser.denoise(start, guidance_of(prompts, torch.arange(2), CPU), lambda _: start)
        found.append(policy.decode(path.latents[:, -1], prompts.conditioning))
    expected = case.diffusers_videos(policy, start, STEPS, guided=True)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(*found)
    euler = evaluation_denoiser(policy, replace(recipe, evaluation=replace(evaluation, solver="euler")))
    other = euler.denoise(start, guidance_of(prompts, torch.arange(2), CPU), lambda _: start)
    differs = not torch.allclose(other.latents[:, -1], path.latents[:, -1], atol=1e-3)
    assert differs == (denoiser.scheduler is not None) == (name != "ltx")


def test_the_shift_comes_from_the_recipe(tmp_path: Path) -> None:
    case = CASES["wan"]
    case.write(tmp_path / "pipeline")
    policy, recipe = case.policy(tmp_path / "pipeline", components=()), case.recipe(tmp_path / "pipeline")
    evaluation = replace(recipe.evaluation, solver="shipped", num_steps=STEPS)
    own, shifted = (
        evaluation_denoiser(policy, replace(recipe, evaluation=replace(evaluation, shift=shift)))
        for shift in (None, 9.0)
    )
    assert (shifted.sigmas[1:-1] > own.sigmas[1:-1]).all()
    assert policy.pipeline.scheduler.num_inference_steps is None, "the policy's scheduler is unchanged"


def test_a_scheduler_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    case = CASES["cogvideox"]
    case.write(tmp_path / "pipeline")
    policy, recipe = case.policy(tmp_path / "pipeline", components=()), case.recipe(tmp_path / "pipeline")
    config = replace(recipe, evaluation=replace(recipe.evaluation, solver="shipped", num_steps=STEPS))
    assert evaluation_denoiser(policy, config).scheduler is None  # DDIM without noise is Euler's method there
    policy.pipeline.scheduler = CogVideoXDPMScheduler.from_config(policy.pipeline.scheduler.config)
    with pytest.raises(ConfigError, match=r"ships a CogVideoXDPMScheduler.*'euler'"):
        evaluation_denoiser(policy, config)
