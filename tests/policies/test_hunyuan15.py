"""HunyuanVideo 1.5: masks, the guidance and sizes stored in its pipeline, and refused folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideo15Pipeline, HunyuanVideo15Transformer3DModel
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.generation import GenerationSettings
from bpgo_video.config.policy import LoraConfig
from bpgo_video.config.reading import to_yaml
from bpgo_video.inference.model_files import write_diffusers_lora
from bpgo_video.inference.pipeline import add_adapters, resolve
from bpgo_video.inference.run_weights import find_model
from bpgo_video.policies.attention_backends import choose_attention
from bpgo_video.policies.hunyuan15 import mask_keys
from bpgo_video.policies.lora import ADAPTER
from bpgo_video.policies.networks import Transformers
from bpgo_video.weights import WeightsError
from tests.families.case import CPU
from tests.families.hunyuan15 import HUNYUAN_15, HUNYUAN_15_IMAGE, TEXTS, random_hunyuan15
from tests.made.zero_checkpoints import write_checkpoint

SIGMA = torch.tensor(0.7)
RESOLUTIONS = (640, 960)  # target_size of the 480p and 720p transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hunyuan15(tmp_path_factory.mktemp("hunyuan15") / "pipeline")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hunyuan15(tmp_path_factory.mktemp("hunyuan15") / "pipeline", images=True)


def changed(folder: Path, copy: Path, file: str, **settings: Any) -> Path:
    """A copy of the folder with changed settings in one file."""
    shutil.copytree(folder, copy)
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return copy


def padded_inputs(transformer: Any) -> dict[str, Any]:
    """Two samples: one with five and three real text tokens, one with two and none."""
    generator = torch.Generator().manual_seed(0)
    text, glyphs = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    text[1, 2:], glyphs[1] = False, False
    return {
        "hidden_states": torch.randn(2, 9, 3, 2, 3, generator=generator), "timestep": torch.tensor([900.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator), "encoder_attention_mask": text,
        "encoder_hidden_states_2": torch.randn(2, 3, 16, generator=generator), "encoder_attention_mask_2": glyphs,
        "image_embeds": torch.randn(2, 4, 24, generator=generator), "return_dict": False,
    }  # fmt: skip


@pytest.fixture
def transformer(image_folder: Path) -> Any:
    return HunyuanVideo15Transformer3DModel.from_pretrained(image_folder / "transformer")


def test_a_key_mask_equals_the_full_attention_mask(transformer: Any) -> None:
    """Output and all gradients against diffusers' attention processor."""

    def found() -> tuple[Tensor, dict[str, Tensor]]:
        transformer.zero_grad()
        output = transformer(**padded_inputs(transformer))[0]
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        named = transformer.named_parameters()
        return output.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}

    expected, gradients = found()
    mask_keys(transformer)
    output, found_gradients = found()
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found_gradients[name] - gradient).norm() < 1e-5 * max(gradient.norm(), 1e-3 * total), name


def test_padding_does_not_affect_the_output(transformer: Any) -> None:
    mask_keys(transformer)
    inputs = padded_inputs(transformer)
    expected = transformer(**inputs)[0]
    inputs["encoder_hidden_states"][1, 2:] = 7.0
    inputs["encoder_hidden_states_2"][1] = 7.0
    torch.testing.assert_close(transformer(**inputs)[0], expected, rtol=0, atol=2e-6)
    inputs["encoder_attention_mask_2"] = torch.ones(2, 3, dtype=torch.bool)
    assert (transformer(**inputs)[0][1] - expected[1]).abs().max() > 1e-3


def test_a_chosen_backend_is_kept_when_sequence_groups_are_set_up(transformer: Any) -> None:
    mask_keys(transformer)
    choose_attention(Transformers({"transformer": transformer}), "_native_math")
    expected = transformer(**padded_inputs(transformer))[0]
    mask_keys(transformer)
    backends = {str(block.attn.processor._attention_backend) for block in transformer.transformer_blocks}
    assert backends == {"AttentionBackendName._NATIVE_MATH"}
    assert torch.equal(transformer(**padded_inputs(transformer))[0], expected)


def test_a_longer_maximum_text_length_changes_nothing(folder: Path) -> None:
    """If the text fits, a max_sequence_length below the pipeline's 1000 gives the pipeline's video."""
    latents = torch.randn(2, *HUNYUAN_15.policy(folder).latent_shape(HUNYUAN_15.video))
    found = []
    for tokens in (HUNYUAN_15.text_tokens, 40):
        policy = replace(HUNYUAN_15, text_tokens=tokens).policy(folder)
        conditioning = policy.encode(TEXTS)
        assert conditioning["prompt_embeds"].shape[1] == tokens
        found.append(policy.velocity(latents, SIGMA, conditioning))
    torch.testing.assert_close(*found, rtol=0, atol=2e-6)


def test_a_quoted_word_is_encoded_by_its_letters(folder: Path) -> None:
    conditioning = HUNYUAN_15.policy(folder).encode(TEXTS)
    spelled = len('Text "circle". ') + 1  # one token per byte, and the end token
    assert conditioning["prompt_embeds_mask_2"].sum(dim=1).tolist() == [spelled, 0]
    assert conditioning["prompt_embeds_mask"].sum(dim=1).tolist() == [6, 6], "five words and the start of an answer"
    assert all(conditioning[name].dtype == torch.bool for name in conditioning if "mask" in name)


@pytest.mark.parametrize("images", [False, True])
def test_meanflow_is_refused_by_name(folder: Path, image_folder: Path, tmp_path: Path, images: bool) -> None:
    case, base = (HUNYUAN_15_IMAGE, image_folder) if images else (HUNYUAN_15, folder)
    copy = changed(base, tmp_path / "copy", "transformer/config.json", use_meanflow=True)
    with pytest.raises(ConfigError, match="sets use_meanflow to True"):
        case.policy(copy, components=())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("guidance_rescale", 0.7), ("use_original_formulation", True), ("start", 0.2), ("stop", 0.8)],
)
def test_guidance_that_rollouts_do_not_implement_is_refused(
    folder: Path, tmp_path: Path, setting: str, value: float
) -> None:
    copy = changed(folder, tmp_path / "copy", "guider/guider_config.json", **{setting: value})
    with pytest.raises(ConfigError, match=f"guider sets {setting} to {value}"):
        HUNYUAN_15.policy(copy, components=())


def test_another_guider_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path / "copy", "model_index.json", guider=["diffusers", "SkipLayerGuidance"])
    with pytest.raises(ConfigError, match="has the guider 'SkipLayerGuidance'"):
        HUNYUAN_15.policy(copy, components=())


def generation_of(policy: Path, **settings: Any) -> Any:
    requested = GenerationSettings(policy=str(policy), prompts=policy, output=policy, seed=0, **settings)
    return resolve(requested, find_model(requested).policy)


def test_omitted_generation_settings_are_the_pipelines(folder: Path, tmp_path: Path) -> None:
    call = generation_of(folder)
    assert (call.guidance_scale, call.max_sequence_length, call.num_frames) == (6.0, 1000, 121)
    assert (call.height, call.width, call.num_inference_steps) == (32, 48, 50)
    published = changed(folder, tmp_path / "copy", "transformer/config.json", target_size=640)
    assert (generation_of(published).height, generation_of(published).width) == (480, 848)
    distilled = changed(folder, tmp_path / "distilled", "guider/guider_config.json", enabled=False)
    assert generation_of(distilled).guidance_scale == 1.0


def test_a_checkpoint_generates_with_the_requested_scale(folder: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002", [{"transformer.x": torch.ones(1)}])
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(HUNYUAN_15.recipe(folder)))
    assert generation_of(checkpoint, guidance_scale=2.5).guidance_scale == 2.5


@pytest.fixture(scope="module", params=RESOLUTIONS)
def resolution(
    image_folder: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, int]:
    copy = tmp_path_factory.mktemp("published") / "copy"
    changed(image_folder, copy, "transformer/config.json", target_size=request.param)
    return HUNYUAN_15_IMAGE.policy(copy, components=()), request.param


@settings(deadline=None, max_examples=50)
@given(height=st.integers(8, 100), width=st.integers(8, 100))
def test_a_size_must_be_one_of_the_pipelines(resolution: tuple[Any, int], height: int, width: int) -> None:
    """For an image of an accepted size, the pipeline generates a video of that size."""
    policy, target = resolution
    video = replace(HUNYUAN_15_IMAGE.video, height=16 * height, width=16 * width)
    try:
        policy.latent_shape(video)
    except ConfigError as error:
        named = [int(word.strip(".,:;")) for word in str(error).split() if word.strip(".,:;").isdigit()][-2:]
        video = replace(video, height=named[0], width=named[1])
        policy.latent_shape(video)
    sides = (video.height, video.width)
    assert HunyuanVideo15ImageProcessor().calculate_default_height_width(*sides, target) == sides


def test_a_size_with_another_aspect_ratio_is_refused(resolution: tuple[Any, int]) -> None:
    policy, target = resolution
    video = replace(HUNYUAN_15_IMAGE.video, height=480, width=832)
    nearest = {640: "480 x 816", 960: "752 x 1200"}[target]
    with pytest.raises(ConfigError, match=f"makes {nearest}: set video.height"):
        policy.latent_shape(video)


def test_an_image_provides_features_and_the_first_frame(image_folder: Path) -> None:
    policy: Any = HUNYUAN_15_IMAGE.policy(image_folder)
    prompts = HUNYUAN_15_IMAGE.prompts(policy, HUNYUAN_15_IMAGE.recipe(image_folder))
    seen: dict[str, Tensor] = {}
    policy.transformers["transformer"].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    latents = torch.randn(2, *policy.latent_shape(HUNYUAN_15_IMAGE.video), device=CPU)
    policy.velocity(latents, SIGMA, prompts.conditioning)
    noisy, clean, mask = seen["hidden_states"].split([4, 4, 1], dim=1)
    assert prompts.images is not None
    assert torch.equal(noisy, latents)
    torch.testing.assert_close(clean[:, :, :1], policy.encode_video(prompts.images[:, None]), rtol=0, atol=1e-6)
    assert not clean[:, :, 1:].any()
    assert mask[:, :, 0].all()
    assert not mask[:, :, 1:].any()
    assert not torch.equal(*seen["image_embeds"])


def test_adapters_are_loaded_into_the_transformer_if_the_pipeline_cannot_load_them(
    folder: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((4, 32), (32, 4)))

    def write(layer: str) -> Path:
        file = tmp_path / layer / "pytorch_lora_weights.safetensors"
        adapters = {f"{layer}.lora_{half}.{ADAPTER}.weight": value for half, value in (("A", down), ("B", up))}
        write_diffusers_lora(adapters, LoraConfig(rank=4, alpha=8), "HunyuanVideo15Pipeline", file)
        return file

    pipeline = HunyuanVideo15Pipeline.from_pretrained(folder)
    with pytest.raises(WeightsError, match=r"pytorch_lora_weights.*no such layer"):
        add_adapters(pipeline, write("blocks.0.attn1.to_q"), "transformer", folder)
    add_adapters(pipeline, write("transformer_blocks.0.attn.to_q"), "transformer", folder)
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    torch.testing.assert_close(layer.get_delta_weight(ADAPTER), 8 / 4 * up @ down)
