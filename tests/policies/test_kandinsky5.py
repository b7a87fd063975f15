"""Kandinsky 5: transformer inputs, texts of different lengths, precision, schedule, and given frames."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5Attention,
    Kandinsky5RoPE1D,
    Kandinsky5RoPE3D,
    get_freqs,
)
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.generation import GenerationSettings
from bpgo_video.inference.generate import initial_latents, plan, read_records, sample
from bpgo_video.inference.pipeline import load_pipeline, resolve
from bpgo_video.inference.run_weights import find_model
from bpgo_video.policies.attention import check_heads
from bpgo_video.policies.kandinsky5 import Kandinsky5Policy, prepare, text_positions
from tests.families import CASES, load_policy
from tests.families.case import CPU, TEXTS
from tests.families.kandinsky5 import random_kandinsky5, random_transformer

TEXT, IMAGE = CASES["kandinsky5"], CASES["kandinsky5_image"]
SIGMA = torch.tensor(0.7)
Received = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-video pipeline with channels for given frames but no given frames."""
    path: Path = tmp_path_factory.mktemp("kandinsky5") / "pipeline"
    random_kandinsky5(path, visual_cond=True)
    return path


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("kandinsky5_image") / "pipeline"
    IMAGE.write(path)
    return path


def long_transformer() -> Kandinsky5Transformer3DModel:
    """A transformer with large queries and keys as after initialisation, so that attention is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = random_transformer()
    for module in transformer.modules():
        if isinstance(module, Kandinsky5Attention):
            torch.nn.init.constant_(module.query_norm.weight, 1.5)
            torch.nn.init.constant_(module.key_norm.weight, 1.5)
    return transformer


def inputs_of(texts: Tensor, positions: Tensor) -> dict[str, Any]:
    samples, generator = len(texts), torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(samples, 3, 4, 4, 4, generator=generator),
        "timestep": torch.tensor([900.0, 20.0])[:samples], "encoder_hidden_states": texts,
        "pooled_projections": torch.randn(samples, 32, generator=generator), "text_rope_pos": positions,
        "visual_rope_pos": [torch.arange(3), torch.arange(2), torch.arange(2)], "return_dict": False,
    }  # fmt: skip


def test_masked_padding_equals_no_padding() -> None:
    """Each text gives the output of diffusers' transformer for that text alone, up to one bf16 rounding."""
    transformer, lengths = long_transformer(), (6, 2)
    texts = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    whole = inputs_of(texts, text_positions(mask))
    alone = []
    for row, length in enumerate(lengths):
        own = {name: value[row : row + 1] for name, value in whole.items() if isinstance(value, Tensor)}
        own |= {"encoder_hidden_states": texts[row : row + 1, :length], "text_rope_pos": torch.arange(length)}
        alone.append(transformer(**{**whole, **own}))
    expected = torch.cat(alone)
    prepare(transformer)
    found = transformer(**whole)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    texts[1, 2:] = 7.0
    torch.testing.assert_close(transformer(**whole), found, rtol=0, atol=0)
    unmasked = transformer(**{**whole, "text_rope_pos": torch.arange(6)})
    torch.testing.assert_close(unmasked[0], expected[0], rtol=0, atol=2e-3)
    assert (unmasked[1] - expected[1]).abs().max() > 0.1


def test_a_recomputed_block_uses_its_original_mask() -> None:
    """Another forward with different texts runs between a forward and its backward."""
    transformer = long_transformer()
    prepare(transformer)
    transformer.enable_gradient_checkpointing()
    texts = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    masks = [torch.arange(6) < torch.tensor(lengths)[:, None] for lengths in ((6, 2), (1, 5))]

    def gradients(between: bool) -> list[Tensor]:
        transformer.zero_grad()
        loss = transformer(**inputs_of(texts, text_positions(masks[0]))).square().mean()
        if between:
            transformer(**inputs_of(texts, text_positions(masks[1])))
        loss.backward()
        return [parameter.grad for parameter in transformer.parameters() if parameter.grad is not None]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("images", [False, True])
def test_the_transformer_receives_the_inputs_of_the_pipeline(
    images: bool, folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first rollout step; the policy only has additional text positions for padding."""
    case = IMAGE if images else TEXT
    policy: Any = case.policy(image_folder if images else folder)
    received: Received = []
    forward = Kandinsky5Transformer3DModel.forward
    monkeypatch.setattr(
        Kandinsky5Transformer3DModel, "forward",
        lambda self, **given: received.append({name: _copied(value) for name, value in given.items()})
        or forward(self, **given),
    )  # fmt: skip
    noise = torch.randn(2, *policy.latent_shape(case.video), generator=torch.Generator().manual_seed(1))
    case.diffusers_videos(policy, noise.clone(), 1, guided=False)
    prompts = case.prompts(policy, case.recipe(policy.folder))
    policy.velocity(noise, policy.sigmas(1, case.video)[0], prompts.conditioning)
    *by_pipeline, found = received
    for row, expected in enumerate(by_pipeline):
        for name in ("hidden_states", "timestep", "pooled_projections"):
            torch.testing.assert_close(found[name][row : row + 1], expected[name], rtol=0, atol=1e-6)
        length = len(expected["text_rope_pos"])
        assert found["text_rope_pos"][row].tolist() == [*range(length), *[-1] * (case.text_tokens - length)]
        texts = expected["encoder_hidden_states"]
        torch.testing.assert_close(found["encoder_hidden_states"][row : row + 1, :length], texts, rtol=0, atol=1e-6)
        assert [axis.tolist() for axis in found["visual_rope_pos"]] == [
            axis.tolist() for axis in expected["visual_rope_pos"]
        ]
        assert found["scale_factor"] == expected["scale_factor"] == (1, 3.16, 3.16)
    assert found["hidden_states"].shape[-1] == 2 * 4 + 1
    assert found["hidden_states"][:, 0, ..., -1].eq(1).all() == images


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def test_positions_are_scaled_at_480_line_sizes(folder: Path) -> None:
    policy: Any = TEXT.policy(folder, components=("transformer",))
    received: Received = []
    policy.transformers["transformer"].register_forward_pre_hook(
        lambda _, args, given: received.append(given), with_kwargs=True
    )
    latents, conditioning = policy.example()
    for height, width in ((512, 768), (768, 1280)):
        size = latents[..., :1, :1].expand(-1, -1, -1, height // 8, width // 8)
        with torch.no_grad():
            policy.velocity(size[:, :, :1], SIGMA, conditioning)
    assert [given["scale_factor"] for given in received] == [(1, 2, 2), (1, 3.16, 3.16)]


def test_in_bfloat16_positions_are_exact_and_the_velocity_is_close(folder: Path) -> None:
    whole, halved = (TEXT.policy(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    transformer = halved.transformers["transformer"]
    assert transformer.time_embeddings.in_layer.weight.dtype == torch.float32, "the dtype that diffusers keeps"
    assert transformer.visual_embeddings.in_layer.weight.dtype == torch.bfloat16
    latents, conditioning = whole.example()
    expected = whole.velocity(latents, SIGMA, conditioning)
    cast = {name: value.bfloat16() if value.is_floating_point() else value for name, value in conditioning.items()}
    found = halved.velocity(latents, SIGMA, cast)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(transformer.text_rope_embeddings.args, Kandinsky5RoPE1D(16).args)
    exact = dict(Kandinsky5RoPE3D((4, 6, 6)).named_buffers())
    assert len(exact) == 3
    for name, buffer in transformer.visual_rope_embeddings.named_buffers():
        assert torch.equal(buffer, exact[name])
    transformer.time_embeddings.freqs = (
        transformer.time_embeddings.freqs.bfloat16()
    )  # as construction under ZeRO-3 does
    prepare(transformer)
    assert torch.equal(transformer.time_embeddings.freqs, get_freqs(16))


def test_texts_are_encoded_individually_and_padded(folder: Path) -> None:
    policy: Any = TEXT.policy(folder, components=("text_encoder",))
    together = policy.encode([TEXTS[0], "a"])
    for row, text in enumerate((TEXTS[0], "a")):
        states, pooled, lengths = policy.pipeline.encode_prompt(text, max_sequence_length=TEXT.text_tokens)
        length = int(lengths[-1])
        assert torch.equal(together["prompt_embeds"][row, :length], states[0])
        assert torch.equal(together["pooled_prompt_embeds"][row], pooled[0])
        assert together["prompt_attention_mask"][row].tolist() == [place < length for place in range(12)]
        assert not together["prompt_embeds"][row, length:].any()
    assert together["prompt_attention_mask"].sum(dim=1).tolist() == [6, 2], "including the suffix of the template"


def test_a_generated_video_does_not_depend_on_longer_texts_in_its_batch(folder: Path, tmp_path: Path) -> None:
    """diffusers' pipeline attends to the padding of the shorter text when both are in one call."""
    (tmp_path / "prompts.txt").write_text(f"{TEXTS[0]}\na")
    settings = GenerationSettings(
        policy=str(folder), prompts=tmp_path / "prompts.txt", output=tmp_path / "videos", seed=5, num_steps=2,
        num_frames=9, height=48, width=48, guidance_scale=1.0, max_sequence_length=TEXT.text_tokens, batch_size=2,
    )  # fmt: skip
    model = find_model(settings)
    call, jobs = resolve(settings, model.policy), plan(settings, read_records(settings))
    pipeline = load_pipeline(model, settings, CPU)
    together = sample(pipeline, model.policy, jobs, settings, call)
    (alone, _), *_ = sample(pipeline, model.policy, jobs[1:], settings, call)
    torch.testing.assert_close(together[1][0], alone, rtol=0, atol=1e-5)
    noise = initial_latents(jobs, model.policy.latent_shape(TEXT.video))
    given = call.given() | model.policy.call_arguments(pipeline, noise, TEXT.video, None)
    padded = pipeline(prompt=[job.text for job in jobs], output_type="pt", **given).frames
    assert (padded[1] - alone).abs().max() > 1e-3


def test_the_schedule_applies_the_shift_twice_like_diffusers(folder: Path) -> None:
    """diffusers' scheduler starts from its smallest level, which is already shifted."""

    def shifted(levels: Any, shift: float) -> Any:
        return shift * levels / (1 + (shift - 1) * levels)

    policy = TEXT.policy(folder, components=())
    levels = np.linspace(1, shifted(0.001, 5.0), 4)
    for given_shift, shift in ((None, 5.0), (3.0, 3.0)):
        expected = torch.tensor([*shifted(levels, shift), 0.0], dtype=torch.float32)
        torch.testing.assert_close(policy.sigmas(4, TEXT.video, given_shift), expected, rtol=0, atol=1e-6)


def test_an_image_to_video_sample_is_decoded_with_its_own_statistics(image_folder: Path) -> None:
    """The pipeline matches the first four frames to the following ones over a batch; the policy does so per video."""
    policy: Any = IMAGE.policy(image_folder)
    conditioning = IMAGE.prompts(policy, IMAGE.recipe(image_folder)).conditioning
    latents = torch.randn(2, *policy.latent_shape(IMAGE.video), generator=torch.Generator().manual_seed(1))
    latents[1] = 3 * latents[1] + 1
    together = policy.decode(latents, conditioning)
    for row in range(2):
        own = {name: value[row : row + 1] for name, value in conditioning.items()}
        alone = policy.decode(latents[row : row + 1], own)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


def test_unsupported_settings_are_refused_by_name(folder: Path, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_frames is 13, 4 latent frames: .* take 17 frames or more"):
        IMAGE.policy(image_folder, components=()).latent_shape(replace(IMAGE.video, num_frames=13))
    with pytest.raises(ConfigError, match=r"patches of \(1, 2, 2\); the transformer knows 128 positions"):
        TEXT.policy(folder, components=()).latent_shape(replace(TEXT.video, width=2064))
    config = json.loads((folder / "transformer" / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"this policy's 2 attention heads; .* one of \[1, 2\]"):
        check_heads(config, 3, Kandinsky5Policy.sequence_plan)
    sparse = tmp_path / "sparse"
    (sparse / "transformer").mkdir(parents=True)
    (sparse / "model_index.json").write_text((folder / "model_index.json").read_text())
    (sparse / "transformer" / "config.json").write_text(json.dumps({**config, "attention_type": "nabla"}))
    with pytest.raises(ConfigError, match=r"attention_type to 'nabla'; .* samples only \['regular'\]"):
        load_policy(str(sparse), max_sequence_length=12, components=())
