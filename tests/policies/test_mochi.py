"""Mochi: attention with masked padding, schedule, empty texts, and videos equal to diffusers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import MochiPipeline, MochiTransformer3DModel

from bpgo_video.config.generation import GenerationError, GenerationSettings
from bpgo_video.data.records import prompt_id
from bpgo_video.inference.generate import plan, read_records, sample
from bpgo_video.inference.pipeline import load_pipeline, resolve
from bpgo_video.inference.run_weights import find_model
from bpgo_video.policies.mochi import mask_keys
from bpgo_video.randomness import keyed_noise
from tests.families.mochi import MOCHI

TEXTS = ["a red circle moving left", "a blue square moving up"]
SIZE = {"num_frames": 13, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("mochi") / "pipeline"
    MOCHI.write(path)
    return path


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> GenerationSettings:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    return GenerationSettings(
        policy=str(folder), prompts=tmp_path / "prompts.txt", output=tmp_path / "videos", seed=5, num_steps=4,
        guidance_scale=2.0, batch_size=2,
    )  # fmt: skip


def test_masked_padding_equals_no_padding(folder: Path) -> None:
    transformer = MochiTransformer3DModel.from_pretrained(folder / "transformer")
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 2:] = False
    inputs = {
        "hidden_states": torch.randn(2, 12, 3, 4, 4, generator=generator), "timestep": torch.tensor([900.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 6, 16, generator=generator), "encoder_attention_mask": mask,
        "return_dict": False,
    }  # fmt: skip
    expected = transformer(**inputs)[0]
    mask_keys(transformer)
    torch.testing.assert_close(transformer(**inputs)[0], expected, rtol=0, atol=2e-6)
    inputs["encoder_hidden_states"][1, 2:] = 7.0
    torch.testing.assert_close(transformer(**inputs)[0], expected, rtol=0, atol=2e-6)
    inputs["encoder_attention_mask"] = torch.ones_like(mask)
    assert (transformer(**inputs)[0][1] - expected[1]).abs().max() > 1e-3


def test_the_schedule_is_linear_then_quadratic(folder: Path) -> None:
    """The first half of the steps decreases to 1 - .025, the rest to 0 in growing steps."""
    sigmas = MOCHI.policy(folder, components=()).sigmas(64, MOCHI.video)
    torch.testing.assert_close(sigmas[:33], 1 - 0.025 * torch.arange(33) / 32, rtol=0, atol=1e-6)
    assert bool((sigmas[32:].diff().diff() < 0).all())
    assert float(sigmas[-1]) == 0.0


def test_an_empty_text_does_not_affect_other_samples(folder: Path) -> None:
    policy = MOCHI.policy(folder, components=("text_encoder",))
    policy.pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    alone, batched = policy.encode(TEXTS[:1]), policy.encode([TEXTS[0], ""])
    for name in alone:
        assert torch.equal(batched[name][:1], alone[name])
    assert not batched["mask"][1].any()


def test_generation_equals_the_pipeline(settings: GenerationSettings, folder: Path) -> None:
    settings = GenerationSettings(**{**vars(settings), **SIZE})
    model = find_model(settings)
    jobs, call = plan(settings, read_records(settings)), resolve(settings, model.policy)
    found = sample(load_pipeline(model, settings, torch.device("cpu")), model.policy, jobs, settings, call)
    noise = keyed_noise(model.policy.latent_shape(MOCHI.video), [(5, "generation", prompt_id(TEXTS[1]), 0)], "cpu")
    expected = MochiPipeline.from_pretrained(folder)(
        prompt=TEXTS[1], negative_prompt="", num_inference_steps=4, guidance_scale=2.0, max_sequence_length=16,
        latents=noise, output_type="pt", **SIZE,
    ).frames  # fmt: skip
    torch.testing.assert_close(found[1][0], expected[0], rtol=0, atol=1e-5)
    assert found[1][0].std() > 0.01


def test_the_default_size_is_the_pipelines_and_the_scheduler_is_fixed(settings: GenerationSettings) -> None:
    policy = find_model(settings).policy
    call = resolve(settings, policy)
    assert (call.num_frames, call.height, call.width, policy.fps) == (19, 480, 848, 30.0)
    with pytest.raises(GenerationError, match="scheduler is 'euler', but this model supports only its own"):
        resolve(GenerationSettings(**{**vars(settings), "scheduler": "euler"}), policy)
