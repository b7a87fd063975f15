"""LTX-2: its sound equals its pipeline's; video and sound are one state; folders that cannot be sampled so."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import LTX2Pipeline

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.planning.models import find_model, policy_of
from bpgo_video.policies import Policy
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import Denoiser
from tests.families.case import CPU, NEGATIVE, Case
from tests.families.ltx2 import LTX2, VIDEO, random_ltx2

STEPS = 3
NEWER = Case(partial(random_ltx2, newer=True), VIDEO, LTX2.text_tokens, encodes_clips=False)


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def case(request: pytest.FixtureRequest) -> Case:
    return {"2.0": LTX2, "2.3": NEWER}[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ltx2") / "pipeline"
    case.write(path)
    return path


@pytest.fixture
def policy(case: Case, folder: Path) -> Policy:
    return case.policy(folder)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_video_and_sound_equal_those_of_the_pipeline(case: Case, folder: Path, policy: Policy, scale: float) -> None:
    config = case.recipe(folder)
    prompts = case.prompts(policy, config)
    noise = torch.randn(2, *policy.latent_shape(VIDEO), generator=torch.Generator().manual_seed(2))
    sigmas = policy.sigmas(STEPS, VIDEO)
    denoiser = Denoiser(policy, sigmas, "ode", eta=0.0, guidance_scale=scale, latents_dtype=torch.float32)
    latents = denoiser.denoise(noise, guidance_of(prompts, torch.arange(2), CPU), lambda _: noise).latents[:, -1]
    videos, audio = (make(latents, prompts.conditioning) for make in (policy.decode, policy.decode_audio))
    pipeline = LTX2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        list(case.texts), [NEGATIVE] * 2, VIDEO.height, VIDEO.width, VIDEO.num_frames, num_inference_steps=STEPS,
        guidance_scale=scale, max_sequence_length=case.text_tokens, output_type="pt",
        **policy.call_arguments(pipeline, noise, VIDEO, None),
    )  # fmt: skip
    torch.testing.assert_close(videos, expected.frames, rtol=0, atol=1e-5)
    torch.testing.assert_close(audio.waveform, expected.audio, rtol=0, atol=1e-5)
    assert audio.sampling_rate == pipeline.vocoder.config.output_sampling_rate
    assert (audio.waveform[0] - audio.waveform[1]).std() > 1e-3
    assert abs(audio.waveform.shape[2] / audio.sampling_rate - VIDEO.num_frames / VIDEO.fps) < 0.05


def test_video_and_sound_depend_on_each_other(case: Case, folder: Path, policy: Policy) -> None:
    conditioning = case.prompts(policy, case.recipe(folder)).conditioning
    latents = torch.randn(2, *policy.latent_shape(VIDEO), generator=torch.Generator().manual_seed(2))
    of_video = latents.shape[2] - 11  # 9 frames at 20 a second, 25 tokens a second
    before = policy.velocity(latents, torch.tensor(0.8), conditioning)
    for changed, other in (
        (slice(None, of_video), slice(of_video, None)),
        (slice(of_video, None), slice(None, of_video)),
    ):
        moved = latents.clone()
        moved[:, :, changed] += 1.0
        after = policy.velocity(moved, torch.tensor(0.8), conditioning)
        assert (after - before)[:, :, other].abs().max() > 1e-4


def test_published_sizes() -> None:
    """768x512 at 24 frames a second: 16 latent frames of 16 x 24, and 126 audio tokens."""
    policy = policy_of(find_model("ltx-2"), None, 1024)
    video = VideoConfig(num_frames=121, height=512, width=768, fps=24.0)
    assert policy.video_shape(video) == (128, 16, 16, 24)
    assert policy.latent_shape(video) == (128, 16 * 16 * 24 + 126, 1, 1)
    assert policy.text_shapes(1024) == {"prompt_embeds": (1024, 3840), "audio_prompt_embeds": (1024, 3840)}


def test_clips_are_refused(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="LTX2Policy cannot be trained on clips, which have no sound"):
        policy.encode_video(torch.zeros(1, 9, 3, 64, 96))


def set_config(file: Path, **settings: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_unequal_features_are_refused(tmp_path: Path) -> None:
    random_ltx2(tmp_path)
    set_config(tmp_path / "audio_vae" / "config.json", mel_bins=32)
    set_config(tmp_path / "transformer" / "config.json", audio_in_channels=16)
    with pytest.raises(ConfigError, match="video tokens have 8 features and audio tokens 16"):
        LTX2.policy(tmp_path, components=())


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("audio_vae", "mel_bins", 32, "sets audio_in_channels to 8, but the VAEs make 16"),
        ("audio_vae", "sample_rate", 24000, "sets audio_sampling_rate to 16000, but the VAEs make 24000"),
        (
            "connectors",
            "audio_connector_num_learnable_registers",
            None,
            "audio_connector_num_learnable_registers to None",
        ),
        ("vae", "timestep_conditioning", True, "sets timestep_conditioning to True; LTX2Pipeline samples only"),
        ("transformer", "rope_type", "interleaved", "sets rope_type to 'interleaved'; LTX2Pipeline samples only"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    part: str, name: str, value: object, message: str, tmp_path: Path
) -> None:
    random_ltx2(tmp_path)
    set_config(tmp_path / part / "config.json", **{name: value})
    with pytest.raises(ConfigError, match=message):
        LTX2.policy(tmp_path, components=())
