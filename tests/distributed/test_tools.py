"""Tools on real runs: converted checkpoints equal the run's export and reproduce its scores."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file

from bpgo_video.config.reading import read_yaml
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.zero_files import ZeroParameters
from bpgo_video.evaluation.heldout import evaluate_folder, with_changes
from bpgo_video.inference.conversion import Conversion, convert
from bpgo_video.inference.hub import this_code
from bpgo_video.inference.run_weights import find_checkpoint
from bpgo_video.training.metrics import read_metrics
from tests.distributed.conftest import SMOKE, STAGES

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
RUNS = [f"ratio-{stage}-{adapters}" for stage in STAGES for adapters in ("full", "lora")]


@pytest.mark.parametrize("name", [*RUNS, *(f"smoke-{name}" for name in SMOKE)])
def test_a_checkpoint_converts_to_the_export_bit_for_bit(worlds: dict[int, Path], tmp_path: Path, name: str) -> None:
    run_dir = worlds[2] / name
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    output = tmp_path / "out"
    convert(Conversion(find_checkpoint(run_dir), "raw", output, dtype), "diffusers", verify=True)
    for card in (run_dir / "export" / "README.md", output / "README.md"):
        assert f"| trained by | {this_code()} |" in card.read_text()
    expected, found = load_file(run_dir / "export" / WEIGHTS), load_file(output / WEIGHTS)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def test_joined_parameters_equal_those_of_deepspeed_for_any_world_and_stage(worlds: dict[int, Path]) -> None:
    names = {1: [f"gradient-{stage}" for stage in STAGES], 2: [*RUNS, *(f"smoke-{name}" for name in SMOKE), "whole"]}
    for folder in (worlds[size] / name for size, runs in names.items() for name in runs):
        checkpoint = find_checkpoint(folder).folder
        found = ZeroParameters(checkpoint)
        with redirect_stdout(io.StringIO()):
            expected = get_fp32_state_dict_from_zero_checkpoint(
                str(checkpoint.parent), checkpoint.name, exclude_frozen_parameters=True
            )
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("form", ["lora", "comfyui", "universal"])
@pytest.mark.parametrize("stage", STAGES)
def test_adapters_and_universal_checkpoints_of_real_runs_verify(
    worlds: dict[int, Path], tmp_path: Path, stage: str, form: str
) -> None:
    source = find_checkpoint(worlds[2] / f"ratio-{stage}-lora")
    convert(Conversion(source, "raw", tmp_path / "out"), form, verify=True)
    assert not list(tmp_path.glob("partial-*"))


def test_an_earlier_checkpoint_differs_from_the_newest(worlds: dict[int, Path], tmp_path: Path) -> None:
    checkpoints = worlds[2] / "whole" / "checkpoints"
    early, late = tmp_path / "early", tmp_path / "late"
    convert(Conversion(find_checkpoint(checkpoints / "step-000002"), "raw", early), "diffusers")
    convert(Conversion(find_checkpoint(checkpoints.parent), "raw", late), "diffusers")
    exported = load_file(worlds[2] / "whole" / "export" / WEIGHTS)
    assert all(torch.equal(tensor, exported[key]) for key, tensor in load_file(late / WEIGHTS).items())
    assert not all(torch.equal(tensor, exported[key]) for key, tensor in load_file(early / WEIGHTS).items())


def test_scores_of_the_export_equal_those_of_the_run(worlds: dict[int, Path]) -> None:
    run_dir = worlds[2] / "whole"
    config = with_changes(read_yaml(run_dir / "config.yaml"), policy=str(run_dir / "export"))
    config = replace(config, evaluation=replace(config.evaluation, videos=0))
    mesh = Mesh(rank=0, world_size=1, device=torch.device("cpu"))
    evaluation = evaluate_folder(config, mesh)
    reported = read_metrics(run_dir / "metrics.jsonl")[-1]
    assert evaluation["rewards"], "the recipe must have held-out rewards"
    for name, reward in evaluation["rewards"].items():
        found = reward["by_tag"]["all"]
        assert found["mean"] == pytest.approx(reported[f"heldout/{name}"], abs=1e-5)
        assert found["stderr"] == pytest.approx(reported[f"heldout/{name}_stderr"], abs=1e-5)
