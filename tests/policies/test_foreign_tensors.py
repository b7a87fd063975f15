"""Folders with tensors that are no weights of their network: harmless ones load, signs of a wrong config do not."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from bpgo_video.distributed.ds_config import model_buffers, tensor_files
from bpgo_video.files import resolve_folder
from bpgo_video.policies.networks import from_pretrained, networks_of
from bpgo_video.weights import BESIDES, BUFFERS, WeightsError, check_stored, load_network

TINY = resolve_folder("package:bpgo_video.tiny/weights/wan")
Tensors = dict[str, Tensor]
T5 = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 32, "projection_dim": 4, "max_position_embeddings": 8, "bos_token_id": 0}
TEXT |= {"eos_token_id": 1, "pad_token_id": 2}
VISION = {**SIZES, "image_size": 8, "patch_size": 4, "projection_dim": 4}
QWEN_TEXT = {**TEXT, "num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
QWEN_VISION = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 4}
PAIR = {"text_config": TEXT, "vision_config": VISION}
QWEN = {"text_config": QWEN_TEXT, "vision_config": {**QWEN_VISION, "out_hidden_size": 8}}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {  # an encoder -> the model that it is a part of, and its config
    "CLIPTextModel": ("CLIPModel", {**PAIR, "projection_dim": 4}),
    "CLIPTextModelWithProjection": ("CLIPModel", {**PAIR, "projection_dim": 4}),
    "CLIPVisionModel": ("CLIPModel", {**PAIR, "projection_dim": 4}),
    "CLIPVisionModelWithProjection": ("CLIPModel", {**PAIR, "projection_dim": 4}),
    "LlamaModel": ("LlamaForCausalLM", TEXT),
    "Qwen2_5_VLTextModel": ("Qwen2_5_VLForConditionalGeneration", QWEN),
    "SiglipVisionModel": ("SiglipModel", PAIR),
    "T5EncoderModel": ("T5ForConditionalGeneration", T5),
    "UMT5EncoderModel": ("UMT5ForConditionalGeneration", T5),
}


def whole_model(name: str) -> Any:
    """A small random model."""
    kind, settings = WHOLE[name]
    network = getattr(transformers, kind)
    return network(network.config_class(**settings))


def config_of(model: Any, encoder: Any) -> Any:
    configs = (model.config, *(getattr(model.config, part, None) for part in ("text_config", "vision_config")))
    return next(config for config in configs if isinstance(config, encoder.config_class))


def tables_of(network: Any) -> Tensors:
    """Weights and buffers."""
    return {**network.state_dict(), **dict(network.named_buffers())}


def with_tensors(folder: Path, extra: Tensors) -> Path:
    file = next(folder.glob("*.safetensors"))
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", BESIDES)
def test_an_encoder_loads_from_the_larger_model_that_it_is_a_part_of(name: str, tmp_path: Path) -> None:
    encoder, model = getattr(transformers, name), whole_model(name)
    model.save_pretrained(tmp_path)
    config = config_of(model, encoder)
    config.save_pretrained(tmp_path)
    found = load_network(encoder, tmp_path, torch.float32).state_dict()
    saved = {tensor.numpy().tobytes() for tensor in load_file(tmp_path / "model.safetensors").values()}
    assert all(tensor.numpy().tobytes() in saved for tensor in found.values())
    depth = "num_layers" if hasattr(config, "num_layers") else "num_hidden_layers"
    setattr(config, depth, 1)
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:1]
    config.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=rf"does not have: \S*\.1\..*{'download the folder again'}"):
        load_network(encoder, tmp_path, torch.float32)


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPVisionModel", "LlamaModel", "UMT5EncoderModel"])
def test_buffers_that_older_versions_stored_change_nothing(name: str, tmp_path: Path) -> None:
    encoder = getattr(transformers, name)
    network = encoder(config_of(whole_model(name), encoder))
    network.save_pretrained(tmp_path)
    names = {f"embeddings.{word}" for word in BUFFERS} | {f"layers.0.self_attn.{word}" for word in BUFFERS}
    with_tensors(tmp_path, {name: torch.full((3,), -7) for name in names})
    found = tables_of(load_network(encoder, tmp_path, torch.float32))
    expected = tables_of(network)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_projection_is_no_part_of_another_encoder(tmp_path: Path) -> None:
    transformers.T5EncoderModel(transformers.T5Config(**T5)).save_pretrained(tmp_path)
    with_tensors(tmp_path, {"visual_projection.weight": torch.ones(2, 2)})
    with pytest.raises(WeightsError, match=r"T5EncoderModel .* does not have: visual_projection\.weight"):
        load_network(transformers.T5EncoderModel, tmp_path, torch.float32)


def test_a_transformer_computes_its_own_tables_of_positions(tmp_path: Path) -> None:
    """Wan's tables are not among its weights: whatever a folder holds for them is not read, whole or sharded."""
    copytree(TINY, tmp_path / "wan")
    folder, network = tmp_path / "wan" / "transformer", networks_of(TINY)["transformer"]
    foreign = ("rope.freqs_cos", "blocks.0.attn1._extra_state", "blocks.0.attn2.norm_added_q.weight")
    with_tensors(folder, {name: torch.full((3,), -7.0) for name in foreign})
    files = tensor_files(folder, network)
    own = check_stored(network, folder, files)
    assert own.keys() == load_file(TINY / "transformer" / "diffusion_pytorch_model.safetensors").keys()
    expected = tables_of(from_pretrained(network, TINY / "transformer", torch.float32))
    found = tables_of(from_pretrained(network, folder, torch.float32))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sharded = model_buffers(network, folder, own)
    assert all(torch.equal(sharded[name], expected[name]) for name in sharded)
