"""Export of whole transformers for ComfyUI: one file with the original key names, written one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from bpgo_video.commands.convert import main
from bpgo_video.config.policy import LoraConfig
from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.inference.conversion import Conversion, convert, verify_output
from bpgo_video.inference.model_files import write_single_file
from bpgo_video.inference.run_weights import find_checkpoint
from bpgo_video.policies import original_names
from tests.inference.test_conversion import LORA, WEIGHTS, adapted_run, converted, trained_weights, write_run
from tests.made.random_wan import random_wan

BLOCKS = 2


def wan_keys(images: bool) -> set[str]:
    """The state dict of WanModel in the authors' code (github.com/Wan-Video/Wan2.1, wan/modules/model.py)."""
    affine = ["patch_embedding", "head.head", "time_projection.1"]
    affine += [f"{part}_embedding.{i}" for part in ("text", "time") for i in (0, 2)]
    affine += [f"img_emb.proj.{i}" for i in (0, 1, 3, 4) if images]
    bare = ["head.modulation"]
    for block in (f"blocks.{i}" for i in range(BLOCKS)):
        attention = [f"{block}.{kind}_attn" for kind in ("self", "cross")]
        affine += [f"{block}.norm3", f"{block}.ffn.0", f"{block}.ffn.2"]
        affine += [f"{one}.{letter}" for one in attention for letter in "qkvo"]
        affine += [f"{block}.cross_attn.{letter}_img" for letter in "kv" if images]
        bare += [f"{block}.modulation", *(f"{one}.norm_{letter}.weight" for one in attention for letter in "qk")]
        bare += [f"{block}.cross_attn.norm_k_img.weight"] if images else []
    return {f"{name}.{kind}" for name in affine for kind in ("weight", "bias")} | set(bare)


@pytest.fixture(scope="module", params=[False, True], ids=["text", "image"])
def images(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def base(images: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_wan(tmp_path_factory.mktemp("policy") / "wan", images=images, image_encoder=images)


def test_a_whole_transformer_has_the_names_of_the_authors_code(base: Path, images: bool, tmp_path: Path) -> None:
    """diffusers' converter restores every tensor from those names."""
    trained = trained_weights(base)
    checkpoint = write_run(tmp_path / "run", base, trained)
    found = load_file(converted(checkpoint, tmp_path / "out", "comfyui") / "transformer.safetensors")
    assert set(found) == wan_keys(images)
    back = convert_wan_transformer_to_diffusers(dict(found))
    assert back.keys() == trained.keys()
    assert all(torch.equal(back[name], trained[name]) for name in trained)


def test_merged_adapters_equal_those_of_the_pipeline_export(base: Path, tmp_path: Path) -> None:
    checkpoint, _ = adapted_run(base, tmp_path, LORA)
    options = {"dtype": torch.bfloat16}
    found = load_file(
        converted(checkpoint, tmp_path / "c", "comfyui", merged=True, **options) / "transformer.safetensors"
    )
    expected = load_file(converted(checkpoint, tmp_path / "d", "diffusers", **options) / WEIGHTS)
    name_of = original_names("WanPipeline")
    assert found.keys() == {name_of(name) for name in expected}
    for name, tensor in expected.items():
        assert found[name_of(name)].dtype == tensor.dtype
        assert torch.equal(found[name_of(name)], tensor)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("change", ["value", "missing", "foreign"])
def test_verify_detects_modified_files(base: Path, tmp_path: Path, change: str) -> None:
    job = Conversion(find_checkpoint(write_run(tmp_path / "run", base, trained_weights(base))), "raw", tmp_path / "out")
    convert(job, "comfyui")
    file, name = job.output / "transformer.safetensors", "blocks.1.cross_attn.norm_q.weight"
    tensors = load_file(file)
    if change == "value":
        tensors[name][0] += 1e-6
    if change == "missing":
        del tensors[name]
    if change == "foreign":
        name = "blocks.9.modulation"
        tensors[name] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=name):
        verify_output(job, "comfyui")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_written_tensor_by_tensor_equals_that_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (3, 5), "a.weight": (2, 1, 4), "scalar": (), "empty": (0, 2)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    write_single_file(
        tmp_path / "ours", {name: (shape, dtype) for name, shape in shapes.items()}, reversed(tensors.items())
    )
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(found[name].dtype == dtype for name in tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(2)}, "lacks tensors: b$"),
        ({"a": torch.zeros(3)}, "a is not in the file's layout, or is not of"),
        ({"a": torch.zeros(2).bfloat16()}, "a is not in the file's layout, or is not of"),
        ({"c": torch.zeros(2)}, "c is not in the file's layout"),
    ],
)
def test_a_file_must_contain_the_announced_tensors(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_single_file(tmp_path / "x", {"a": ((2,), torch.float32), "b": ((1,), torch.float32)}, tensors.items())


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("universal", ["--weights", "ema"], "--format universal does not support --weights"),
        ("universal", ["--dtype", "bfloat16"], "does not support --dtype"),
        (
            "universal",
            ["--push-to-hub", "a/b"],
            "does not support --push-to-hub; remove it, or write --format diffusers",
        ),
        ("lora", ["--merged"], "does not support --merged; remove it, or write --format comfyui"),
        ("lora", ["--transformer-only"], "does not support --transformer-only; remove it, or write --format diffusers"),
        (
            "comfyui",
            ["--shard-gigabytes", "1"],
            "does not support --shard-gigabytes; remove it, or write --format diffusers",
        ),
    ],
)
def test_a_setting_that_a_format_does_not_support_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, options: list[str], message: str
) -> None:
    checkpoint, _ = adapted_run(base, tmp_path, LoraConfig(rank=2))
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--format", form, *options]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
