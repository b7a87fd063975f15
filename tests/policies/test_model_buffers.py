"""Model buffers under sharded construction, and hooks on blocks that are called by keyword."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bpgo_video.distributed.ds_config import (
    PrecisionError,
    check_buffers,
    check_parameters,
    model_buffers,
    tensor_files,
)
from bpgo_video.distributed.engine import call_by_position
from bpgo_video.policies.lora import merged_parameters
from bpgo_video.policies.networks import from_pretrained, networks_of
from tests.distributed.conftest import run_ranks
from tests.families import CASES

LEARNED = "patch_embed.pos_embedding"


@pytest.mark.parametrize("name", ["wan", "cogvideox", "cogvideox_image"])
def test_buffers_equal_those_that_diffusers_loads(name: str, tmp_path: Path) -> None:
    CASES[name].write(tmp_path)
    model_class, folder = networks_of(tmp_path)["transformer"], tmp_path / "transformer"
    expected = dict(model_class.from_pretrained(folder).named_buffers())
    found = model_buffers(model_class, folder, tensor_files(folder, model_class))
    assert found.keys() == expected.keys()
    assert found
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "cogvideox_image", "kandinsky5"])
def test_an_unsharded_bf16_model_has_the_tensors_of_the_pipeline(name: str, tmp_path: Path) -> None:
    CASES[name].write(tmp_path)
    model_class, folder = networks_of(tmp_path)["transformer"], tmp_path / "transformer"
    exact = model_buffers(model_class, folder, tensor_files(folder, model_class))
    expected = dict(model_class.from_pretrained(folder, torch_dtype=torch.bfloat16).named_parameters())
    model = from_pretrained(model_class, folder, torch.bfloat16)
    found = dict(model.named_parameters())
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in expected.items()}
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(buffer, exact[key]) for key, buffer in model.named_buffers())


def test_a_tensor_with_another_dtype_is_named(tmp_path: Path) -> None:
    CASES["wan"].write(tmp_path)
    model_class, folder = networks_of(tmp_path)["transformer"], tmp_path / "transformer"
    model = from_pretrained(model_class, folder, torch.bfloat16)
    exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(PrecisionError, match=r"parameter patch_embedding.weight of .* is torch.bfloat16 and"):
        check_parameters(model, torch.float32)
    model.condition_embedder.time_embedder.bfloat16()
    with pytest.raises(PrecisionError, match=r"time_embedder.linear_1.weight .* must be torch.float32"):
        check_parameters(model, torch.bfloat16)
    model.rope.bfloat16()
    with pytest.raises(PrecisionError, match=r"buffer rope.freqs_cos .* is torch.bfloat16 and must be torch.float"):
        check_buffers(model, exact)


def test_tensors_ignored_by_the_models_class_are_not_loaded(tmp_path: Path) -> None:
    """Wan 2.1's published image-to-video folders contain such tensors in every block."""
    CASES["wan_image"].write(tmp_path)
    model_class, folder = networks_of(tmp_path)["transformer"], tmp_path / "transformer"
    before = tensor_files(folder, model_class)
    file = next(iter(before.values()))
    tensors = {**load_file(file), "blocks.0.attn2.norm_added_q.weight": torch.ones(4)}
    save_file(tensors, file)
    assert tensor_files(folder, model_class) == before
    save_file({**tensors, "blocks.0.unknown": torch.ones(4)}, file)
    assert tensor_files(folder, model_class).keys() - before.keys() == {"blocks.0.unknown"}


def test_an_export_contains_the_persistent_buffers(tmp_path: Path) -> None:
    CASES["cogvideox_image"].write(tmp_path)
    policy = CASES["cogvideox_image"].policy(tmp_path, components=("transformer",))
    engine: Any = SimpleNamespace(module=policy.transformers, gathered=lambda _: nullcontext())
    written = dict(merged_parameters(engine, "transformer"))
    model_class = networks_of(tmp_path)["transformer"]
    assert written.keys() == tensor_files(tmp_path / "transformer", model_class).keys()
    assert torch.equal(written[LEARNED], policy.transformers["transformer"].patch_embed.pos_embedding)


class Block(nn.Module):
    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return x + scale * text


def test_keyword_inputs_of_blocks_become_positional() -> None:
    blocks = nn.ModuleList([Block(), Block()])
    call_by_position(blocks, (Block,))
    seen: list[tuple[Any, ...]] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args))
    one = torch.ones(2)
    assert torch.equal(blocks[0](text=one, x=2 * one), 3 * one)
    assert torch.equal(blocks[1](2 * one, text=one, scale=3.0), 5 * one)
    assert [len(args) for args in seen] == [2, 2]


@pytest.mark.slow
def test_buffers_are_exact_in_bf16_under_zero3(tmp_path: Path) -> None:
    folders = []
    for name in ("wan", "cogvideox", "cogvideox_image"):
        CASES[name].write(tmp_path / name)
        folders.append(str(tmp_path / name))
    run_ranks(2, [str(tmp_path), *folders], worker="buffers_worker")
    for rank in range(2):
        errors = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(errors) >= 4
        assert set(errors.values()) == {0.0}, errors
