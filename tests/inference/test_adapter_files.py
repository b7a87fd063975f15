"""Files of adapters that do not fit the model or are damaged: refused by name before a video is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from bpgo_video.config.policy import LoraConfig
from bpgo_video.files import resolve_folder
from bpgo_video.inference.model_files import check_lora, write_comfyui_lora, write_diffusers_lora
from bpgo_video.policies.lora import ADAPTER, add_lora, merged_tensors
from bpgo_video.policies.networks import networks_of
from bpgo_video.weights import WeightsError, load_network

LORA = LoraConfig(rank=4, alpha=8, target_modules=("to_q",))
LAYER = "blocks.0.attn1.to_q"
AUTHORS = "blocks.0.self_attn.q"  # their name of LAYER
LAYOUTS = {  # a layout -> its writer, and the A and B of LAYER
    "diffusers": (write_diffusers_lora, *(f"transformer.{LAYER}.lora_{half}.weight" for half in "AB")),
    "comfyui": (write_comfyui_lora, *(f"diffusion_model.{AUTHORS}.lora_{half}.weight" for half in ("down", "up"))),
}
LACKS = f"{LAYER} lacks its A or its B|lacks a half of an adapter, .{AUTHORS}"
Tensors = dict[str, Tensor]
DAMAGES: dict[str, tuple[Callable[[Tensors, str, str], Tensors], str]] = {
    "shape of A": (lambda tensors, a, b: {**tensors, a: torch.ones(4, 7)}, rf"adapter of {LAYER} has A \[4, 7\] and B"),
    "shape of B": (lambda tensors, a, b: {**tensors, b: torch.ones(5, 4)}, rf"of {LAYER} has A .* and B \[5, 4\], but"),
    "rank": (lambda tensors, a, b: {**tensors, a: torch.ones(2, 128)}, rf"adapter of {LAYER} has A \[2, 128\] and B"),
    "without A": (lambda tensors, a, b: {k: v for k, v in tensors.items() if k != a}, LACKS),
    "without B": (lambda tensors, a, b: {k: v for k, v in tensors.items() if k != b}, LACKS),
    "other layer": (
        lambda tensors, a, b: {**tensors, **{k.replace(".0.", ".9."): tensors[k].clone() for k in (a, b)}},
        "has an adapter of blocks.9.attn1.to_q, but the model has no such layer",
    ),
    "nan": (lambda tensors, a, b: {**tensors, b: tensors[b] + torch.nan}, f"{LAYER}.lora_B.weight holds nan"),
    "integers": (lambda tensors, a, b: {**tensors, a: tensors[a].int()}, "is I32, but weights must be"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_folder("package:bpgo_video.tiny/weights/wan")


@pytest.fixture
def adapters(folder: Path) -> Tensors:
    transformer = load_network(networks_of(folder)["transformer"], folder / "transformer", torch.float32)
    add_lora(transformer, LORA, seed=0)
    return {name: one.detach() for name, one in transformer.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_adapter_is_named(layout: str, damage: str, folder: Path, adapters: Tensors, tmp_path: Path) -> None:
    (write, *halves), (change, message) = LAYOUTS[layout], DAMAGES[damage]
    file = tmp_path / "adapters.safetensors"
    write(adapters, LORA, "WanPipeline", file)
    base = load_network(networks_of(folder)["transformer"], folder / "transformer", torch.float32)
    pipeline = SimpleNamespace(lora_state_dict=WanPipeline.lora_state_dict)
    check_lora(pipeline, file, base)
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors, *halves), file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"adapters\.safetensors.*({message}).*; give adapters of this model"):
        check_lora(pipeline, file, base)


def test_a_damaged_file_is_named(folder: Path, adapters: Tensors, tmp_path: Path) -> None:
    file = tmp_path / "adapters.safetensors"
    write_diffusers_lora(adapters, LORA, "WanPipeline", file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"adapters\.safetensors is damaged"):
        check_lora(SimpleNamespace(lora_state_dict=WanPipeline.lora_state_dict), file, torch.nn.Linear(1, 1))


def test_a_checkpoints_adapters_of_another_shape_are_not_merged() -> None:
    adapters = {f"x.lora_A.{ADAPTER}.weight": torch.ones(4, 7), f"x.lora_B.{ADAPTER}.weight": torch.ones(6, 4)}
    with pytest.raises(
        ValueError, match=r"adapter of x has A \[4, 7\] and B \[6, 4\], but the layer's weight is \[6, 8\]"
    ):
        list(merged_tensors([("x.weight", torch.ones(6, 8))], adapters, LORA))
