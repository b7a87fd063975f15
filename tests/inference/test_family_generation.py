"""Generation for every family: videos equal those of diffusers' pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from PIL import Image
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.generation import GenerationSettings
from bpgo_video.data.records import prompt_id
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.inference.generate import describe, generate, read_records
from bpgo_video.inference.pipeline import resolve
from bpgo_video.inference.run_weights import find_model
from bpgo_video.randomness import generator_of, keyed_noise
from tests.families import CASES
from tests.inference.videos import case_settings, jobs_of, videos

ByHand = Callable[[Any, Tensor, Image.Image], dict[str, Any]]  # (pipeline, noise, picture) -> arguments of its call


def ltx(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    return {
        "latents": pipeline._pack_latents(noise), "guidance_scale": 2.0, "frame_rate": 24, "decode_timestep": 0.05,
        "decode_noise_scale": 0.025, "generator": generator_of("decode"),
    }  # fmt: skip


def ltx_image(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    pixels = pipeline.video_processor.preprocess(picture, *noise.new_tensor(noise.shape[-2:]).int().mul(32).tolist())
    drawn = pipeline.vae.encode(pixels[:, :, None]).latent_dist.sample(torch.Generator().manual_seed(3))
    given = pipeline._normalize_latents(drawn, pipeline.vae.latents_mean, pipeline.vae.latents_std)
    latents = pipeline._pack_latents(torch.cat([given, noise], dim=2))
    return {"latents": latents, "guidance_scale": 2.0, "frame_rate": 24, "image": picture}


def hunyuan(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    return {"latents": noise, "guidance_scale": 4.0, "true_cfg_scale": 2.0}


def hunyuan15(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=2.0)
    pipeline.tokenizer_max_length = CASES["hunyuan15"].text_tokens
    return {"latents": noise}


def hunyuan15_image(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    return {**hunyuan15(pipeline, noise, picture), "image": picture}


def hunyuan_image(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    whole = torch.cat([torch.full_like(noise[:, :, :1], 7.0), noise], dim=2)  # the image replaces the first frame
    return {"latents": whole, "guidance_scale": 4.0, "true_cfg_scale": 2.0, "image": picture}


def hunyuan_image_concat(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    frames = 4 * (noise.shape[2] - 1) + 1  # including the four dropped frames
    return {"latents": noise, "num_frames": frames, "true_cfg_scale": 2.0, "image": picture}


def ltx2(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    video, audio = noise.flatten(2).mT.split([12, 11], dim=1)  # 2 x 2 x 3 latent pixels; .45 s, 25 tokens a second
    scales = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    scales |= {
        "guidance_scale": 2.0,
        "audio_guidance_scale": 2.0,
        "guidance_rescale": 0.0,
        "audio_guidance_rescale": 0.0,
    }
    denormalised = audio * pipeline.audio_vae.latents_std + pipeline.audio_vae.latents_mean
    return {"latents": video, "audio_latents": denormalised, "frame_rate": 20, **scales}


def kandinsky5(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    return {"latents": noise.movedim(1, -1).clone(), "guidance_scale": 2.0}


def kandinsky5_image(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    frames, (height, width) = 4 * noise.shape[2] + 1, (8 * size for size in noise.shape[3:])
    latents = pipeline.prepare_latents(picture, 1, 4, height, width, frames, torch.float32, "cpu")
    latents[:, 1:, :, :, :4] = noise.movedim(1, -1)
    return {"latents": latents, "guidance_scale": 2.0, "image": picture}


def flux(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    _, channels, _, height, width = noise.shape
    latents = pipeline._pack_latents(noise[:, :, 0], 1, channels, height, width)
    return {"latents": latents, "guidance_scale": 2.0, "true_cfg_scale": 2.0}


def sd3(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    return {"latents": noise[:, :, 0], "guidance_scale": 2.0}


def qwen_image(pipeline: Any, noise: Tensor, picture: Image.Image) -> dict[str, Any]:
    _, channels, _, height, width = noise.shape
    return {"latents": pipeline._pack_latents(noise, 1, channels, height, width), "true_cfg_scale": 2.0}


BY_HAND: dict[str, ByHand] = {
    "ltx": ltx, "ltx_image": ltx_image, "hunyuan": hunyuan, "hunyuan_image": hunyuan_image,
    "hunyuan_image_concat": hunyuan_image_concat, "kandinsky5": kandinsky5, "kandinsky5_image": kandinsky5_image,
    "hunyuan15": hunyuan15, "hunyuan15_image": hunyuan15_image, "flux": flux, "ltx2": ltx2,
    "sd35": sd3, "qwen_image": qwen_image,
}  # fmt: skip


@pytest.fixture(scope="module", params=BY_HAND)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "pipeline"
    CASES[name].write(path)
    return path


@pytest.fixture
def settings(name: str, folder: Path, tmp_path: Path) -> GenerationSettings:
    return case_settings(CASES[name], folder, tmp_path, num_steps=3, family=None)


def test_videos_equal_those_of_diffusers_in_any_batch(name: str, folder: Path, settings: GenerationSettings) -> None:
    case, policy, found = CASES[name], find_model(settings).policy, videos(settings)
    pipeline = getattr(diffusers, policy.pipeline_name).from_pretrained(folder)
    for row, text in enumerate(case.texts):
        noise = keyed_noise(policy.latent_shape(case.video), [(5, "generation", prompt_id(text), 0)], "cpu")
        own = BY_HAND[name](pipeline, noise, case.pictures()[row])
        given = {
            "height": case.video.height, "width": case.video.width, "max_sequence_length": case.text_tokens,
            "num_frames": case.video.num_frames,
        }  # fmt: skip
        known = inspect.signature(pipeline.__call__).parameters
        output = pipeline(
            prompt=text, negative_prompt="", num_inference_steps=3, output_type="pt",
            **{**{key: value for key, value in given.items() if key in known}, **own},
        )  # fmt: skip
        expected = output.images[:, None] if hasattr(output, "images") else output.frames
        assert expected.shape[1] == case.video.num_frames
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_the_manifest_contains_the_familys_settings(name: str, settings: GenerationSettings) -> None:
    model = find_model(settings)
    call = resolve(settings, model.policy)
    found = describe(settings, model, call, read_records(settings, model.policy.media))
    assert {key: found[key] for key in CASES[name].options} == CASES[name].options
    assert found["guidance_scale"] == 2.0


def test_generation_runs_in_bfloat16(name: str, settings: GenerationSettings) -> None:
    """The VAE runs in fp32, or in bf16 where the pipeline passes it bf16 latents."""
    halved, jobs = replace(settings, dtype="bfloat16"), jobs_of(settings)[:1]
    found, whole = (videos(one, jobs=jobs) for one in (halved, settings))
    assert 0 < (found - whole).abs().mean() < 0.02


def test_a_setting_of_another_family_is_refused(settings: GenerationSettings, name: str) -> None:
    foreign = {"embedded_guidance": None, "decode_timestep": None, "decode_noise_scale": None}
    key = "decode_timestep" if name.startswith(("hunyuan", "flux")) else "embedded_guidance"
    with pytest.raises(ConfigError, match=rf"policy.{key} is 0.5, but .* knows (\[|no such)"):
        find_model(GenerationSettings(**{**vars(settings), **foreign, key: 0.5}))


def test_videos_are_written_with_their_sound(tmp_path: Path) -> None:
    case = CASES["ltx2"]
    case.write(tmp_path / "pipeline")
    generate(case_settings(case, tmp_path / "pipeline", tmp_path), Mesh(0, 1, torch.device("cpu")))
    for name in ("00000-00.mp4", "00001-00.mp4"):
        with av.open(str(tmp_path / "videos" / name)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", 24_000, 2)
            assert abs(audio.duration * audio.time_base - video.duration * video.time_base) < 0.1
            levels = [np.abs(frame.to_ndarray()).max() for frame in container.decode(audio=0)]
        assert max(levels) > 0.01
