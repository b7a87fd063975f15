"""Images and FLUX.1: sizes, schedule, packing, the guidance input, defaults of generation, and refused settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from bpgo_video.config.bpgo import Config, ConfigError, VideoConfig
from bpgo_video.config.generation import GenerationSettings
from bpgo_video.config.reading import read_yaml
from bpgo_video.config.rules import check
from bpgo_video.inference.pipeline import resolve
from bpgo_video.inference.run_weights import find_model
from bpgo_video.policies.image import packed, unpacked
from tests.families import CASES
from tests.made.recipes import RECIPE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("flux") / "pipeline"
    CASES["flux"].write(path)
    return path


def test_only_single_images_of_whole_tokens_are_sampled(folder: Path) -> None:
    policy = CASES["flux"].policy(folder, components=())
    with pytest.raises(ConfigError, match=r"video.num_frames is 9, but FluxPipeline makes images; set it to 1"):
        policy.latent_shape(VideoConfig(num_frames=9, height=32, width=48, fps=1.0))
    with pytest.raises(ConfigError, match=r"video.width is 40; this policy needs a multiple of 16"):
        policy.latent_shape(VideoConfig(num_frames=1, height=32, width=40, fps=1.0))


def test_packing_is_that_of_the_pipeline_and_has_an_inverse() -> None:
    latents = torch.randn(2, 4, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    tokens = packed(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents[:, :, 0], 2, 4, 4, 6))
    assert torch.equal(unpacked(tokens, rows=2), latents)


@pytest.mark.parametrize("side", [16, 64])
def test_the_shift_grows_exponentially_with_the_tokens(folder: Path, side: int) -> None:
    """log shift = .5 at 4 tokens and 1.15 at 64 in this folder; sigma' = shift s/(1 + (shift - 1) s)."""
    policy = CASES["flux"].policy(folder, components=())
    shift = math.exp(0.5 + (1.15 - 0.5) * ((side // 16) ** 2 - 4) / 60)
    levels = torch.linspace(1.0, 0.2, 5)
    expected = torch.cat([shift * levels / (1 + (shift - 1) * levels), torch.zeros(1)])
    found = policy.sigmas(5, VideoConfig(num_frames=1, height=side, width=side, fps=1.0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, policy.sigmas(5, CASES["flux"].video, shift=3.0))


@pytest.mark.parametrize(("name", "guides"), [("flux", True), ("flux_schnell", False)])
def test_only_a_distilled_transformer_takes_a_guidance_scale(name: str, guides: bool, tmp_path: Path) -> None:
    case = CASES[name]
    case.write(tmp_path)
    velocities = []
    for scale in (1.0, 5.0):
        policy: Any = case.policy(tmp_path, components=("transformer",), options={"embedded_guidance": scale})
        latents, conditioning = policy.example()
        velocities.append(policy.velocity(latents, torch.tensor(0.5), conditioning))
    assert torch.equal(*velocities) is not guides


def test_generation_takes_the_pipelines_size_and_the_length_of_t5s_texts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle")
    settings = GenerationSettings(str(folder), tmp_path / "prompts.txt", tmp_path / "images", seed=0)
    policy = find_model(settings).policy
    call = resolve(settings, policy)
    assert (call.num_frames, call.height, call.width) == (1, 1024, 1024)
    assert (call.max_sequence_length, call.guidance_scale) == (16, 1.0)
    assert policy.options == {"embedded_guidance": 3.5}


def test_agreement_of_frames_is_refused_for_images() -> None:
    recipe = read_yaml(RECIPE)
    assert isinstance(recipe, Config)
    image = replace(recipe, video=replace(recipe.video, num_frames=1))
    rewards = {"picture": replace(next(iter(recipe.rewards.values())), trust="frames")}
    with pytest.raises(ConfigError, match=r"rewards.picture has trust 'frames'.*video.num_frames is 1"):
        check(replace(image, rewards=rewards))
