"""HunyuanVideo: embedded and classifier-free guidance, the schedule, and the stored text embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.generation import GenerationSettings
from bpgo_video.config.reading import to_yaml
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import encoder_stamp
from bpgo_video.data.writer import build_shards
from bpgo_video.diffusion.sde import flow_shift
from bpgo_video.inference.pipeline import resolve
from bpgo_video.inference.run_weights import find_model
from bpgo_video.policies import load_policy
from bpgo_video.rollouts.conditioning import guidance_of
from bpgo_video.rollouts.denoiser import Denoiser
from tests.families import CASES
from tests.families.case import CPU, TEXTS
from tests.made.random_wan import random_wan
from tests.made.zero_checkpoints import write_checkpoint

CASE = CASES["hunyuan"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hunyuan") / "pipeline"
    CASE.write(path)
    return path


def test_the_transformer_receives_a_thousand_times_the_guidance(folder: Path) -> None:
    def received(policy: Any) -> Tensor:
        latents, conditioning = policy.example()
        seen: dict[str, Tensor] = {}
        policy.transformers["transformer"].register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        policy.velocity(latents, torch.tensor(0.7), conditioning)
        return seen["guidance"]

    assert received(CASE.policy(folder)).tolist() == [4000.0]
    assert received(CASE.policy(folder, options={})).tolist() == [6000.0], "diffusers' default"


def test_embedded_and_classifier_free_guidance_are_separate_settings(folder: Path, tmp_path: Path) -> None:
    """For a pipeline whose default guidance_scale is 6, classifier-free guidance is 1."""
    settings = GenerationSettings(policy=str(folder), prompts=tmp_path, output=tmp_path, seed=0, height=32, width=48)
    policy = find_model(settings).policy
    assert (resolve(settings, policy).guidance_scale, policy.options) == (1.0, {"embedded_guidance": 6.0})
    received = replace(settings, embedded_guidance=3.0, guidance_scale=2.0)
    policy = find_model(received).policy
    assert (resolve(received, policy).guidance_scale, policy.options) == (2.0, {"embedded_guidance": 3.0})


def test_a_checkpoint_generates_with_the_guidance_of_its_recipe(folder: Path, tmp_path: Path) -> None:
    config = CASE.recipe(folder)
    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002", [{"transformer.x": torch.ones(1)}])
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    settings = GenerationSettings(policy=str(checkpoint), prompts=tmp_path, output=tmp_path, seed=0)
    assert find_model(settings).policy.options == {"embedded_guidance": 4.0}
    assert find_model(replace(settings, embedded_guidance=3.0)).policy.options == {"embedded_guidance": 3.0}


def test_the_schedule_is_linear_with_a_shift_of_seven(folder: Path) -> None:
    policy = CASE.policy(folder, components=())
    levels = torch.linspace(1, 0, 6)
    torch.testing.assert_close(policy.sigmas(5, CASE.video), flow_shift(levels, 7.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(policy.sigmas(5, CASE.video, 3.0), flow_shift(levels, 3.0), rtol=0, atol=1e-6)


def test_a_single_frame_equals_the_pipelines_picture(folder: Path) -> None:
    """Text-to-image."""
    case = replace(CASE, video=replace(CASE.video, num_frames=1))
    policy = case.policy(folder)
    prompts = case.prompts(policy, case.recipe(folder))
    start = torch.randn(2, *policy.latent_shape(case.video), generator=torch.Generator().manual_seed(1))
    denoiser = Denoiser(policy, policy.sigmas(3, case.video), "ode", 0.0, 1.0, torch.float32)
    latents = denoiser.denoise(start, guidance_of(prompts, torch.arange(2), CPU), lambda _: start).latents[:, -1]
    found = policy.decode(latents, prompts.conditioning)
    torch.testing.assert_close(found, case.diffusers_videos(policy, start, 3, guided=False), rtol=0, atol=1e-5)


def test_text_embeddings_survive_a_round_trip_through_shards(folder: Path, tmp_path: Path) -> None:
    """LLaMA states, their mask, and pooled CLIP states: one row per prompt, independent of the batch."""
    policy = CASE.policy(folder, components=("text_encoder",))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    stamp = encoder_stamp(folder, CASE.text_tokens)
    build_shards([prompts], tmp_path / "shards", policy.encode, stamp, batch_size=2)
    shards = PromptShards(tmp_path / "shards")
    for record in shards.records("train"):
        alone = policy.encode([record.prompt])
        assert record.conditioning.keys() == alone.keys()
        for name, value in alone.items():
            assert record.conditioning[name].dtype == value.dtype
            torch.testing.assert_close(record.conditioning[name], value[0], rtol=0, atol=1e-6)
    mask = alone["prompt_attention_mask"]
    assert mask.dtype == torch.bool
    assert mask.sum() == 6, "five words and the suffix of the template"
    assert encoder_stamp(folder, CASE.text_tokens) == stamp
    (folder / "tokenizer_2" / "note").write_text("another")
    assert encoder_stamp(folder, CASE.text_tokens) != stamp, "the second encoder affects the output"


def test_settings_of_this_family_are_refused_by_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy.embedded_guidance is 6.0, but WanPolicy knows no such settings"):
        load_policy(
            str(random_wan(tmp_path)), max_sequence_length=16, components=(), options={"embedded_guidance": 6.0}
        )
