"""Stable Diffusion 3: texts, attention, schedule, sizes, defaults of generation, and refused folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.config.generation import GenerationSettings
from bpgo_video.inference.pipeline import resolve
from bpgo_video.inference.run_weights import find_model
from bpgo_video.policies.sd3 import use_dispatcher
from tests.families import CASES
from tests.families.case import TEXTS

STEPS = 5


@pytest.fixture(scope="module", params=["sd3", "sd35"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("sd3") / "pipeline"
    CASES[name].write(path)
    return path


def test_texts_have_the_planned_shapes_and_need_no_transformer(name: str, folder: Path) -> None:
    policy = CASES[name].policy(folder, components=("text_encoder",))
    found = policy.encode(TEXTS)
    shapes = policy.text_shapes(CASES[name].text_tokens)
    assert {key: tuple(value.shape[1:]) for key, value in found.items()} == shapes
    assert not found["prompt_embeds"][:, :77, 20:].any(), "the CLIPs' states are padded to T5's width"
    assert found["prompt_embeds"][:, 77:, 20:].any()


def test_attention_equals_that_of_diffusers(name: str, folder: Path) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 6, generator=generator), "timestep": torch.tensor([900.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "pooled_projections": torch.randn(2, 20, generator=generator), "return_dict": False,
    }  # fmt: skip
    expected = transformer(**inputs)[0]
    use_dispatcher(transformer)
    torch.testing.assert_close(transformer(**inputs)[0], expected, rtol=0, atol=2e-6)


def test_the_schedule_is_the_schedulers_own(name: str, folder: Path) -> None:
    """Its last level is the smallest of training, shifted twice: by the scheduler's table and by its steps."""
    policy = CASES[name].policy(folder, components=())
    found = policy.sigmas(STEPS, CASES[name].video)
    policy.pipeline.scheduler.set_timesteps(STEPS)
    torch.testing.assert_close(found, policy.pipeline.scheduler.sigmas, rtol=0, atol=1e-6)
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert float(found[-2]) == pytest.approx(3 * once / (1 + 2 * once), rel=1e-4)


def test_a_side_beyond_the_positions_is_refused(name: str, folder: Path) -> None:
    policy = CASES[name].policy(folder, components=())
    assert policy.latent_shape(VideoConfig(1, 512, 512, 1.0)) == (4, 1, 64, 64)
    with pytest.raises(ConfigError, match=r"video is 512 x 528; this transformer has positions for 512 pixels a side"):
        policy.latent_shape(VideoConfig(1, 512, 528, 1.0))


def test_generation_takes_the_transformers_size(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle")
    settings = GenerationSettings(str(folder), tmp_path / "prompts.txt", tmp_path / "images", seed=0)
    call = resolve(settings, find_model(settings).policy)
    assert (call.num_frames, call.height, call.width, call.guidance_scale) == (1, 64, 64, 7.0)
    assert call.max_sequence_length == 16


def test_a_folder_without_t5_is_refused(folder: Path, name: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "text_encoder_3": [None, None]}))
    with pytest.raises(ConfigError, match=r"has no text_encoder_3, without which diffusers does not load"):
        CASES[name].policy(tmp_path / "pipeline", components=())
