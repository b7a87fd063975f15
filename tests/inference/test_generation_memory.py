"""Memory options of generation (tiling, slicing, attention backends, offloading): unchanged videos, or named errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

from bpgo_video.commands.generate import main
from bpgo_video.config.generation import GenerationError, GenerationSettings
from bpgo_video.config.policy import LoraConfig
from bpgo_video.inference import generate as generation
from bpgo_video.inference.generate import describe, read_records
from bpgo_video.inference.pipeline import OFFLOADS, check_offload, resolve, save_memory
from bpgo_video.inference.run_weights import find_model
from bpgo_video.policies.cogvideox import CogVideoXAttention
from tests.families import CASES
from tests.inference.videos import CPU, case_settings, pipeline_of, videos
from tests.made.random_wan import random_wan
from tests.made.recipes import small_recipe
from tests.made.written_runs import write_run


def written(name: str, root: Path) -> GenerationSettings:
    """Write the family's folder; return the settings of a generation with it."""
    CASES[name].write(root / "pipeline")
    return case_settings(CASES[name], root / "pipeline", root)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> GenerationSettings:
    return written("wan", tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def plain(wan: GenerationSettings) -> Tensor:
    return videos(wan)


def test_tiling_is_bit_exact_below_the_tile_size(wan: GenerationSettings, plain: Tensor) -> None:
    tiled = replace(wan, vae_tiling=True)
    assert pipeline_of(tiled).vae.use_tiling
    assert torch.equal(videos(tiled), plain)


def test_tiling_equals_that_of_diffusers(wan: GenerationSettings, plain: Tensor) -> None:
    """Above the tile size, pixels differ at tile borders because diffusers' tiling decodes them."""
    tiled = replace(wan, vae_tiling=True)
    pipeline = pipeline_of(tiled)
    size = {"tile_sample_min_height": 32, "tile_sample_min_width": 32}
    step = {"tile_sample_stride_height": 24, "tile_sample_stride_width": 24}
    pipeline.vae.enable_tiling(**size, **step)
    difference = (videos(tiled, pipeline) - plain).abs()
    assert 0 < difference.mean() < 0.1


def test_slicing_equals_the_batch(wan: GenerationSettings, plain: Tensor) -> None:
    sliced = replace(wan, vae_slicing=True)
    pipeline = pipeline_of(sliced)
    rows: list[int] = []
    decode = pipeline.vae._decode
    pipeline.vae._decode = lambda latents, **options: rows.append(len(latents)) or decode(latents, **options)
    torch.testing.assert_close(videos(sliced, pipeline), plain, rtol=0, atol=1e-5)
    assert rows == [1, 1]


def test_another_attention_backend_gives_the_same_video(wan: GenerationSettings, plain: Tensor) -> None:
    changed = replace(wan, attention_backend="_native_math")
    pipeline = pipeline_of(changed)
    assert pipeline.transformer.blocks[0].attn1.processor._attention_backend == "_native_math"
    torch.testing.assert_close(videos(changed, pipeline), plain, rtol=0, atol=1e-4)


def test_attention_hard_coded_in_diffusers_uses_the_dispatcher(tmp_path: Path) -> None:
    settings = written("cogvideox", tmp_path)
    changed = replace(settings, attention_backend="_native_math")
    pipeline = pipeline_of(changed)
    assert isinstance(pipeline.transformer.transformer_blocks[0].attn1.processor, CogVideoXAttention)
    torch.testing.assert_close(videos(changed, pipeline), videos(settings), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "ltx_image", "kandinsky5_image", "hunyuan"])
def test_offloading_gives_the_same_videos(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU replaces the GPU; accelerate still moves networks and layers with its hooks."""
    by_layer = accelerate.cpu_offload
    monkeypatch.setattr(  # accelerate treats cpu:0 as a device other than cpu
        accelerate, "cpu_offload", lambda model, _, **options: by_layer(model, CPU, **options)
    )
    settings = written(name, tmp_path)
    expected = videos(settings)
    for offload in ("model", "sequential"):
        pipeline = pipeline_of(settings)
        OFFLOADS[offload](pipeline, CPU)
        assert torch.equal(videos(settings, pipeline), expected)
        (at_rest,) = {parameter.device.type for parameter in pipeline.transformer.parameters()}
        assert at_rest == {"model": "cpu", "sequential": "meta"}[offload]


def test_offload_needs_a_gpu(
    wan: GenerationSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "load_pipeline", lambda *_: pytest.fail("no model may be loaded"))
    flags = ["--policy", wan.policy, "--prompts", str(wan.prompts), "--output", str(wan.output), "--seed", "5"]
    size = ["--num-frames", "9", "--height", "64", "--width", "64"]
    monkeypatch.setattr(generation, "ALONE", replace(generation.ALONE, device=CPU))
    assert main([*flags, *size, "--offload", "model"]) == 2
    assert "offload is 'model', but this machine has no GPU" in capsys.readouterr().err
    assert main([*flags, *size, "--attention-backend", "fastest"]) == 2
    assert "error: attention_backend is 'fastest'; diffusers knows" in capsys.readouterr().err
    check_offload("sequential", torch.device("cuda", 1))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose recipe enables tiling and slicing and names a backend."""
    base = random_wan(tmp_path / "wan")
    policy = {"folder": str(base), "vae_tiling": True, "vae_slicing": True, "attention_backend": "_native_math"}
    recipe = small_recipe(tmp_path / "run", tmp_path / "shards", policy=policy)
    return write_run(base, tmp_path / "run", LoraConfig(), recipe)


def test_omitted_settings_come_from_the_run(wan: GenerationSettings, run: Path) -> None:
    from_run = replace(wan, policy=str(run), num_frames=None, height=None, width=None, fps=None)
    found = find_model(from_run).complete(from_run)
    assert (found.vae_tiling, found.vae_slicing, found.attention_backend) == (True, True, "_native_math")
    assert (found.num_frames, found.height, found.width, found.fps) == (9, 64, 64, 8)
    explicit = replace(from_run, vae_tiling=False, attention_backend="native")
    found = find_model(explicit).complete(explicit)
    assert (found.vae_tiling, found.vae_slicing, found.attention_backend) == (False, True, "native")
    assert find_model(wan).complete(wan) == wan


def test_the_manifest_contains_settings_that_affect_pixels(wan: GenerationSettings) -> None:
    def described(**changes: object) -> dict[str, Any]:
        settings = replace(wan, **changes)
        model = find_model(settings)
        return describe(settings, model, resolve(settings, model.policy), read_records(settings))

    before = described()
    assert (before["vae_tiling"], before["attention_backend"]) == (False, None)
    assert described(vae_slicing=True, offload="model") == before
    assert described(vae_tiling=True, attention_backend="sage") == {
        **before, "vae_tiling": True, "attention_backend": "sage"
    }  # fmt: skip


def test_an_unsupported_option_is_named_by_its_flag(wan: GenerationSettings) -> None:
    model = find_model(wan)
    pipeline = pipeline_of(wan)
    with pytest.raises(GenerationError, match=r"^attention_backend 'flash' cannot be used here: .*`native` needs"):
        save_memory(pipeline, replace(wan, attention_backend="flash"), model.policy)
    pipeline.vae = torch.nn.Linear(2, 2)
    with pytest.raises(GenerationError, match=r"^vae_tiling is true, but Linear does not support it"):
        save_memory(pipeline, replace(wan, vae_tiling=True), model.policy)
