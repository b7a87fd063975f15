"""CogVideoX as a rectified flow: the mapping by hand, refused settings, attention, and videos."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, CreditConfig, VideoConfig
from bpgo_video.config.generation import GenerationError, GenerationSettings
from bpgo_video.data.records import prompt_id
from bpgo_video.diffusion.sde import shifted_sigmas
from bpgo_video.inference.generate import plan, read_records, sample
from bpgo_video.inference.pipeline import load_pipeline, resolve
from bpgo_video.inference.run_weights import find_model
from bpgo_video.policies import Policy
from bpgo_video.policies.cogvideox import use_dispatcher
from bpgo_video.randomness import generator_of, keyed_noise
from bpgo_video.training.estimation import credit_by_frame
from bpgo_video.training.session import Session
from bpgo_video.types import Rewards
from tests.families import CASES
from tests.families.cogvideox import VIDEO

TEXTS = ["a red circle moving left", "a blue square moving up"]
SIZE = {"num_frames": 9, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) / "pipeline" for name in CASES if name.startswith("cogvideox")}
    for name, path in found.items():
        CASES[name].write(path)
    return found


def described(folders: dict[str, Path], name: str) -> Policy:
    """The policy without weights."""
    return CASES[name].policy(folders[name], components=())


def levels_by_hand() -> np.ndarray:
    """sigma = s / (alpha + s) for each training timestep: scaled-linear betas, rescaled to zero terminal SNR."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = np.sqrt(np.cumprod(1 - betas))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    s = np.sqrt(1 - alpha**2)
    return s / (alpha + s)


def test_the_schedule_equals_that_of_ddim(folders: dict[str, Path]) -> None:
    policy, levels = described(folders, "cogvideox"), levels_by_hand()
    np.testing.assert_allclose(policy.sigmas(4, VIDEO), [*levels[[999, 749, 499, 249]], 0], rtol=1e-6)
    assert float(policy.sigmas(50, VIDEO)[0]) == 1.0
    assert torch.equal(policy.sigmas(7, VIDEO, 3.0), shifted_sigmas(7, 3.0))


@pytest.mark.parametrize("angle", [0.02, 0.7, 1.3, math.pi / 2])
def test_velocity_is_noise_minus_data_at_any_level(folders: dict[str, Path], angle: float) -> None:
    """A transformer that predicts v = alpha noise - s data without error receives alpha data + s noise."""
    policy = described(folders, "cogvideox")
    alpha, s = math.cos(angle), math.sin(angle)
    sigma = s / (alpha + s)
    data, noise = torch.randn(2, 2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: dict[str, Any] = {}

    def transformer(name: str, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        seen.update(hidden_states=hidden_states, timestep=timestep)
        return ((alpha * noise - s * data).transpose(1, 2),)

    policy.transformers = transformer
    texts = {"prompt_embeds": torch.zeros(2, 16, 16)}
    found = policy.velocity((1 - sigma) * data + sigma * noise, torch.tensor(sigma), texts)
    torch.testing.assert_close(found, noise - data, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["hidden_states"].transpose(1, 2), alpha * data + s * noise, rtol=1e-5, atol=1e-5)
    assert seen["timestep"].tolist() == [int(np.abs(levels_by_hand() - sigma).argmin())] * 2


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "prediction_type to 'epsilon'"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "leading"}, "timestep_spacing to 'leading'"),
        ("transformer/config.json", {"patch_size_t": 4}, "patch_size_t to 4"),
    ],
)
def test_other_schedules_and_patches_are_refused_by_name(
    tmp_path: Path, file: str, change: dict[str, Any], words: str
) -> None:
    CASES["cogvideox"].write(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words):
        CASES["cogvideox"].policy(tmp_path, components=())


def test_unsupported_sizes_are_named(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"num_frames is 13; this policy makes 8 n \+ 1 frames, for example 9"):
        described(folders, "cogvideox").latent_shape(replace(VIDEO, num_frames=13))
    with pytest.raises(ConfigError, match="learned positions for 9 of 64 x 64 alone"):
        described(folders, "cogvideox_image").latent_shape(replace(VIDEO, num_frames=17))
    assert described(folders, "cogvideox_pairs").latent_shape(replace(VIDEO, num_frames=17)) == (4, 6, 8, 8)


def test_the_number_of_text_tokens_equals_that_of_positions(folders: dict[str, Path]) -> None:
    policy = CASES["cogvideox"].policy(folders["cogvideox"], components=("text_encoder",))
    policy.max_sequence_length = 8
    with pytest.raises(ConfigError, match="max_sequence_length is 8, but this transformer adds positions to 16"):
        policy.encode(TEXTS)


def test_fps_and_size_are_those_of_the_authors(folders: dict[str, Path]) -> None:
    two, pairs = described(folders, "cogvideox"), described(folders, "cogvideox_pairs")
    assert (two.fps, pairs.fps) == (8.0, 16.0)
    assert two.call_defaults() == SIZE
    image = described(folders, "cogvideox_image")
    assert image.call_defaults() == {"height": 64, "width": 64}, "the pipeline's call sets the number of frames"


def test_a_dropped_latent_frame_gets_the_advantage_of_the_video(folders: dict[str, Path]) -> None:
    scores = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0))
    rewards = Rewards({}, torch.zeros(1, 4), {"a": scores}, {"a": torch.arange(9) / 8})
    config = SimpleNamespace(credit=CreditConfig(kind="segment", gamma=0.5), video=VIDEO)

    def credit(name: str) -> Tensor:
        session = object.__new__(Session)  # no other attribute is used
        vars(session).update(config=config, policy=described(folders, name), suite=SimpleNamespace(weights={"a": 1.0}))
        found = credit_by_frame(session, rewards)
        assert found is not None
        return found["a"]

    plain, padded = credit("cogvideox"), credit("cogvideox_pairs")
    assert torch.equal(padded[..., 1:], plain)
    assert not padded[..., 0].any()
    assert plain.abs().max() > 0.1


@pytest.mark.parametrize("rotary", [False, True])
def test_the_dispatched_attention_equals_that_of_diffusers(rotary: bool) -> None:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=5,
        use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(12, 16, generator=generator)
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 4, 4, generator=generator), "timestep": torch.tensor([900, 20]),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
        "image_rotary_emb": (angles.cos(), angles.sin()) if rotary else None, "return_dict": False,
    }  # fmt: skip
    expected = transformer(**inputs)[0]
    use_dispatcher(transformer)
    torch.testing.assert_close(transformer(**inputs)[0], expected, rtol=0, atol=2e-6)
    transformer.set_attention_backend("_native_math")
    torch.testing.assert_close(transformer(**inputs)[0], expected, rtol=0, atol=2e-6)


def settings_of(folder: Path, tmp_path: Path, **changes: Any) -> GenerationSettings:
    """Two prompts with images, which text-to-video ignores."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    lines = [json.dumps({"prompt": text, "image": "image.png"}) for text in TEXTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    settings = GenerationSettings(
        policy=str(folder), prompts=tmp_path / "prompts.jsonl", output=tmp_path / "videos", seed=5, num_steps=4,
        guidance_scale=2.0, batch_size=2, **SIZE,
    )  # fmt: skip
    return replace(settings, **changes)


def videos_of(settings: GenerationSettings) -> Tensor:
    model = find_model(settings)
    jobs = plan(settings, read_records(settings, model.policy.media))
    pipeline = load_pipeline(model, settings, torch.device("cpu"))
    made = sample(pipeline, model.policy, jobs, settings, resolve(settings, model.policy))
    return torch.stack([video for video, _ in made])


@pytest.mark.parametrize(
    ("name", "scheduler"), [("cogvideox", None), ("cogvideox", "dpm"), ("cogvideox_pairs_image", None)]
)
def test_generation_equals_the_pipeline(
    folders: dict[str, Path], tmp_path: Path, name: str, scheduler: str | None
) -> None:
    """With DDIM, and with DPM, which draws noise in every step; the second of two videos equals a single generation."""
    settings = settings_of(folders[name], tmp_path, scheduler=scheduler)
    policy = described(folders, name)
    found = videos_of(settings)
    assert found.shape == (2, 9, 3, 64, 64)
    pipeline = getattr(diffusers, policy.pipeline_name).from_pretrained(folders[name])
    if scheduler:
        pipeline.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    key = (5, "generation", prompt_id(TEXTS[1]), 0)
    image = {"image": Image.open(tmp_path / "image.png")} if policy.takes_images else {}
    expected = pipeline(
        prompt=TEXTS[1], negative_prompt="", num_inference_steps=4, guidance_scale=2.0, max_sequence_length=16, **SIZE,
        latents=keyed_noise(policy.latent_shape(VIDEO), [key], "cpu").transpose(1, 2), output_type="pt",
        generator=[generator_of(*key, "pipeline")], **image,
    ).frames  # fmt: skip
    torch.testing.assert_close(found[1:], expected, rtol=0, atol=1e-5)
    assert found.std() > 0.01


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox_pairs_image"])
def test_a_pipeline_with_a_single_dtype_runs_in_bf16(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    whole = videos_of(settings_of(folders[name], tmp_path, scheduler="ddim"))
    rounded = videos_of(settings_of(folders[name], tmp_path, scheduler="ddim", dtype="bfloat16"))
    assert 0 < (whole - rounded).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheduler": "unipc"}, "scheduler is 'unipc', but this model supports ddim, dpm"),
        ({"scheduler": "dpm", "flow_shift": 3.0}, "flow_shift is 3.0, but this model's scheduler has none"),
        ({"num_frames": 12}, r"num_frames is 12; this policy makes 8 n \+ 1 frames, for example 9"),
    ],
)
def test_settings_of_flow_schedulers_are_refused(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    settings = settings_of(folders["cogvideox"], tmp_path, **change)
    with pytest.raises(GenerationError, match=words):
        resolve(settings, find_model(settings).policy)


def test_size_and_tokens_default_to_those_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    unsaid = dict.fromkeys(("guidance_scale", "num_steps", *SIZE))
    settings = settings_of(folders["cogvideox"], tmp_path, **unsaid)
    call = resolve(settings, find_model(settings).policy)
    assert call.given() == {"num_inference_steps": 50, "guidance_scale": 6, "max_sequence_length": 16, **SIZE}


def test_the_size_of_learned_positions_is_enforced(folders: dict[str, Path], tmp_path: Path) -> None:
    video = VideoConfig(num_frames=9, height=64, width=80, fps=8.0)
    with pytest.raises(ConfigError, match="video is 9 frames of 64 x 80"):
        described(folders, "cogvideox_image").latent_shape(video)
