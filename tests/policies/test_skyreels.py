"""SkyReels-V2 by diffusion forcing: one timestep for all frames, whole timesteps, the frame rate, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.generation import GenerationError
from bpgo_video.data.records import prompt_id
from bpgo_video.inference.pipeline import resolve
from bpgo_video.policies import Policy
from bpgo_video.randomness import generator_of
from tests.families import CASES
from tests.families.skyreels import FORCING
from tests.inference.videos import case_settings, videos

CASE = CASES["skyreels_forcing"]
SIGMA = torch.tensor(0.7237)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "pipeline"
    CASE.write(path)
    return path


def inputs_of(policy: Policy, fps: float) -> tuple[torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, *policy.latent_shape(CASE.video), generator=generator)
    texts = torch.randn(1, CASE.text_tokens, 16, generator=generator)
    return latents, {"prompt_embeds": texts, **policy.video_conditioning(replace(CASE.video, fps=fps))}


@pytest.mark.parametrize("fps", [16.0, 24.0])
def test_the_velocity_is_that_of_equal_timesteps_for_all_frames(folder: Path, fps: float) -> None:
    policy = CASE.policy(folder)
    latents, conditioning = inputs_of(policy, fps)
    with torch.no_grad():
        expected = policy.transformers["transformer"](
            hidden_states=latents, timestep=torch.full((1, latents.shape[2]), 723), fps=[int(fps != 16)],
            encoder_hidden_states=conditioning["prompt_embeds"], enable_diffusion_forcing=True, return_dict=False,
        )[0]  # fmt: skip
        found = policy.velocity(latents, SIGMA, conditioning)
        other = policy.velocity(latents, SIGMA, inputs_of(policy, 40.0 - fps)[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - other).abs().max() > 1e-3, "16 and 24 frames a second are different inputs"


def test_a_transformer_without_a_frame_rate_gets_none(tmp_path: Path) -> None:
    FORCING(tmp_path / "pipeline")
    policy = CASE.policy(tmp_path / "pipeline")
    latents, conditioning = inputs_of(policy, 24.0)
    assert set(conditioning) == {"prompt_embeds"}
    assert policy.velocity(latents, SIGMA, conditioning).isfinite().all()


def test_generation_equals_the_pipeline_with_its_own_scheduler_in_any_batch(folder: Path, tmp_path: Path) -> None:
    settings = case_settings(CASE, folder, tmp_path, num_steps=3, family=None)
    found = videos(settings)
    pipeline = SkyReelsV2DiffusionForcingPipeline.from_pretrained(folder)
    for row, text in enumerate(CASE.texts):
        expected = pipeline(
            text, negative_prompt="", height=64, width=64, num_frames=9, num_inference_steps=3, guidance_scale=2.0,
            max_sequence_length=CASE.text_tokens, fps=24, output_type="pt",
            generator=generator_of(5, "generation", prompt_id(text), 0),
        ).frames  # fmt: skip
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-5)


def test_attention_by_blocks_of_frames_is_refused(tmp_path: Path) -> None:
    FORCING(tmp_path / "pipeline", num_frame_per_block=3)
    with pytest.raises(ConfigError, match=r"sets num_frame_per_block to 3; SkyReelsV2.* samples only \[1\]"):
        CASE.policy(tmp_path / "pipeline", components=())


@pytest.mark.parametrize("changes", [{"scheduler": "euler"}, {"num_steps": None, "sigmas": (1.0, 0.5)}])
def test_schedulers_that_need_exact_timesteps_are_refused(folder: Path, tmp_path: Path, changes: dict) -> None:
    with pytest.raises(GenerationError, match=r"passes whole timesteps, .* write --scheduler unipc or dpm"):
        resolve(case_settings(CASE, folder, tmp_path, **changes), CASE.policy(folder, components=()))
