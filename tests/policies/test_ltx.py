"""LTX-Video compared with its pipeline: schedule, frame rate, given frame, and noisy VAE."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, LTXImageToVideoPipeline, LTXPipeline
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.policies import Policy
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import Denoiser
from bpgo_video.types import PromptBatch
from tests.families import CASES
from tests.families.case import CPU, NEGATIVE, TEXTS
from tests.families.ltx import VIDEO

STEPS = 3
TEXT, IMAGE = CASES["ltx"], CASES["ltx_image"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ltx") / "pipeline"
    TEXT.write(path)
    return path


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ltx") / "image"
    IMAGE.write(path)
    return path


def ode(policy: Policy, start: Tensor, prompts: PromptBatch) -> Tensor:
    """ODE rollout of the first prompts, one for each start."""
    denoiser = Denoiser(policy, policy.sigmas(STEPS, VIDEO), "ode", 0.0, 3.0, torch.float32)
    guidance = guidance_of(prompts, torch.arange(len(start)), CPU)
    return denoiser.denoise(start, guidance, lambda _: start).latents[:, -1]


def test_the_given_frame_equals_that_of_the_pipeline(image_folder: Path) -> None:
    """The pipeline encodes the image and draws noise itself; its VAE's variance is minimal."""
    policy = IMAGE.policy(image_folder)
    pipeline: Any = LTXImageToVideoPipeline.from_pretrained(image_folder)
    expected = pipeline(
        image=IMAGE.pictures()[0], prompt=TEXTS[0], negative_prompt=NEGATIVE, height=VIDEO.height, width=VIDEO.width,
        num_frames=VIDEO.num_frames, frame_rate=VIDEO.fps, num_inference_steps=STEPS, max_sequence_length=16,
        generator=torch.Generator().manual_seed(7), output_type="pt",
    ).frames  # fmt: skip
    channels, frames, height, width = policy.latent_shape(VIDEO)
    generator = torch.Generator().manual_seed(7)
    torch.randn(1, channels, 1, height, width, generator=generator)  # of the image's latents
    noise = torch.randn(1, channels, 1 + frames, height, width, generator=generator)[:, :, 1:]
    prompts = IMAGE.prompts(policy, IMAGE.recipe(image_folder))
    conditioning = {name: value[:1] for name, value in prompts.conditioning.items()}
    found = policy.decode(ode(policy, noise, prompts), conditioning)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_single_given_frame_leaves_nothing_to_sample(image_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_frames is 1, and the image is the first of them.* take 9 frames"):
        IMAGE.policy(image_folder, components=()).latent_shape(replace(VIDEO, num_frames=1))


def test_a_single_frame_equals_the_pipelines_picture(folder: Path) -> None:
    """Text-to-image."""
    case = replace(TEXT, video=replace(VIDEO, num_frames=1))
    policy = case.policy(folder)
    prompts = case.prompts(policy, case.recipe(folder))
    start = torch.randn(2, *policy.latent_shape(case.video), generator=torch.Generator().manual_seed(1))
    denoiser = Denoiser(policy, policy.sigmas(STEPS, case.video), "ode", 0.0, 3.0, torch.float32)
    latents = denoiser.denoise(start, guidance_of(prompts, torch.arange(2), CPU), lambda _: start).latents[:, -1]
    found = policy.decode(latents, prompts.conditioning)
    torch.testing.assert_close(found, case.diffusers_videos(policy, start, STEPS, guided=True), rtol=0, atol=1e-5)


def test_the_shift_follows_the_video_size_or_the_recipe(folder: Path) -> None:
    """The shift is exp(mu), mu linear through (1024 tokens, .95) and (4096, 2.05), then stretched to end at .1, 0."""
    policy = TEXT.policy(folder, components=())
    large = replace(VIDEO, num_frames=97, height=512, width=512)  # 13 x 16 x 16 tokens

    def by_hand(shift: float) -> Tensor:
        levels = torch.linspace(1, 1 / 4, 4, dtype=torch.float64)
        shifted = shift * levels / (1 + (shift - 1) * levels)
        stretched = 1 - (1 - shifted) * (1 - 0.1) / (1 - shifted[-1])
        return torch.cat([stretched, torch.zeros(1)]).float()

    mu = 0.95 + (13 * 16 * 16 - 1024) * (2.05 - 0.95) / (4096 - 1024)
    torch.testing.assert_close(policy.sigmas(4, large), by_hand(math.exp(mu)), rtol=0, atol=1e-6)
    torch.testing.assert_close(policy.sigmas(4, large, 3.0), by_hand(3.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(policy.sigmas(4, VIDEO, 3.0), by_hand(3.0), rtol=0, atol=1e-6)


def test_the_frame_rate_reaches_the_transformer_in_full_precision(folder: Path) -> None:
    """29.97 is not representable in bf16, unlike the embeddings."""
    policy = TEXT.policy(folder)
    case = replace(TEXT, video=replace(VIDEO, fps=29.97))
    prompts = case.prompts(policy, case.recipe(folder))
    assert prompts.conditioning["frame_rate"].tolist() == pytest.approx([29.97, 29.97], rel=1e-7)
    latents, conditioning = policy.example()
    sigma = torch.tensor(0.7)
    slow = policy.velocity(latents, sigma, {**conditioning, "frame_rate": torch.tensor([8.0])})
    assert (slow - policy.velocity(latents, sigma, conditioning)).abs().max() > 1e-3


def test_decoding_does_not_depend_on_the_batch_or_on_earlier_draws(folder: Path, tmp_path: Path) -> None:
    """The 0.9.1 VAE draws noise in its layers, in addition to the remaining noise of the latents."""
    pipeline: Any = LTXPipeline.from_pretrained(folder)
    settings = {**pipeline.vae.config, "decoder_inject_noise": [True] * 5}
    noisy = AutoencoderKLLTXVideo.from_config(settings)
    noisy.load_state_dict(pipeline.vae.state_dict(), strict=False)
    scales = [value for name, value in noisy.named_parameters() if "per_channel_scale" in name]
    for scale in scales:
        torch.nn.init.normal_(scale)
    policy: Any = TEXT.policy(folder)
    plain = policy.pipeline.vae
    latents = torch.randn(3, *policy.latent_shape(VIDEO), generator=torch.Generator().manual_seed(1))
    without = policy.decode(latents, {})
    policy.pipeline.vae = noisy.eval()
    found = policy.decode(latents, {})
    before = torch.random.get_rng_state()
    assert torch.equal(policy.decode(latents, {}), found)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(policy.decode(latents[1:2], {}), found[1:2], rtol=0, atol=1e-5)
    assert scales
    assert (found - without).abs().max() > 1e-3
    policy.pipeline.vae, policy.options = plain, {"decode_timestep": 0.0, "decode_noise_scale": None}
    assert (policy.decode(latents, {}) - without).abs().max() > 1e-3, "the settings reach the VAE"
