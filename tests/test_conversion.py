"""Checkpoints become model folders: parts joined, adapters merged, results checked, damage and foreign code refused.

The checkpoints here are made by hand in ZeRO-2's layout; tests/distributed converts those of real runs.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from bpgo_video.config import LoraConfig
from bpgo_video.config_io import to_yaml
from bpgo_video.conversion import convert_to_diffusers, find_source, main, verify_pipeline
from bpgo_video.policies.lora import add_lora, merged_parameters, merged_tensors
from bpgo_video.zero_files import CheckpointError
from tests.random_wan import LATENTS, TEXT_TOKENS, random_wan
from tests.recipes import small_recipe

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
LORA = LoraConfig(rank=4, alpha=8)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_wan(tmp_path_factory.mktemp("policy") / "wan")


def weights_of(folder: Path) -> Tensors:
    return load_file(folder / WEIGHTS)


def trained_weights(base: Path) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    weights = weights_of(base)
    return {name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}


def adapted_transformer(base: Path) -> WanTransformer3DModel:
    """The base transformer with adapters that are not zero."""
    model = WanTransformer3DModel.from_pretrained(base / "transformer")
    add_lora(model, LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def write_run(run_dir: Path, base: Path, tensors: Tensors, lora: LoraConfig | None = None) -> Path:
    """A run's folder with one checkpoint of two ranks, as ZeRO-2 writes it; the checkpoint's folder."""
    config = small_recipe(run_dir, run_dir / "shards", policy={"folder": str(base), "lora": lora or LoraConfig()})
    folder = run_dir / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "checkpoints" / "latest").write_text(folder.name)
    shapes = OrderedDict((name, tensor.shape) for name, tensor in tensors.items())
    model = {"buffer_names": [], "param_shapes": [shapes], "module": {}, "shared_params": {}, "ds_version": "0"}
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4))
    for rank, part in enumerate(flat.chunk(2)):
        state = {"zero_stage": 2, "partition_count": 2, "single_partition_of_fp32_groups": [part.clone()]}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def test_the_parts_of_all_ranks_come_together_bit_for_bit(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = trained_weights(base)
    write_run(tmp_path / "run", base, trained)
    output = tmp_path / "converted"
    arguments = ["--checkpoint", str(tmp_path / "run"), "--output", str(output), "--format", "diffusers", "--verify"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{output}: step-000002 of {tmp_path / 'run'}, verified\n"
    found = load_file(output / WEIGHTS)
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    others = [path.relative_to(base) for path in base.rglob("*") if path.is_file()]
    for path in set(others) - {WEIGHTS}:
        assert (output / path).read_bytes() == (base / path).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "run"]


def test_bfloat16_is_the_rounded_weights(base: Path, tmp_path: Path) -> None:
    trained = trained_weights(base)
    source = find_source(write_run(tmp_path / "run", base, trained))
    found = load_file(convert_to_diffusers(source, tmp_path / "out", torch.bfloat16, verify=True) / WEIGHTS)
    assert all(torch.equal(found[name], trained[name].bfloat16()) for name in trained)


def test_merged_adapters_compute_what_the_adapters_did(base: Path, tmp_path: Path) -> None:
    model = adapted_transformer(base)
    adapters = {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}
    source = find_source(write_run(tmp_path / "run", base, adapters, LORA))
    output = convert_to_diffusers(source, tmp_path / "out", verify=True)
    merged = WanTransformer3DModel.from_pretrained(output / "transformer")
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "hidden_states": torch.randn(4, *LATENTS, generator=generator),
        "timestep": torch.full((4,), 700.0),
        "encoder_hidden_states": torch.randn(4, TEXT_TOKENS, model.config.text_dim, generator=generator),
    }
    with torch.no_grad():
        before, expected, found = (
            module(**inputs, return_dict=False)[0]
            for module in (WanTransformer3DModel.from_pretrained(base / "transformer"), model, merged)
        )
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert (found - before).norm() / before.norm() > 1e-3


def test_merging_tensors_is_merging_modules(base: Path) -> None:
    model = adapted_transformer(base)

    class Whole:
        module = model

        @contextmanager
        def gathered(self, parameters):
            yield

    expected = dict(merged_parameters(Whole()))
    adapters = {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}
    found = dict(merged_tensors(weights_of(base).items(), adapters, LORA))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("change", ["tensor", "missing", "file"])
def test_verify_finds_what_is_not_as_it_was_written(base: Path, tmp_path: Path, change: str) -> None:
    trained = trained_weights(base)
    output = convert_to_diffusers(find_source(write_run(tmp_path / "run", base, trained)), tmp_path / "out")
    changed = {name: tensor.clone() for name, tensor in trained.items()}
    name = "blocks.0.attn1.to_q.weight"
    if change == "tensor":
        changed[name][0, 0] += 1e-6
    if change == "missing":
        del changed[name]
    save_file(changed, output / WEIGHTS)
    if change == "file":
        (output / "scheduler" / "scheduler_config.json").write_text((output / "model_index.json").read_text())
    with pytest.raises(CheckpointError, match="scheduler_config" if change == "file" else name):
        verify_pipeline(trained.items(), base, output)


def fail(capsys: pytest.CaptureFixture[str], checkpoint: Path, output: Path) -> str:
    assert main(["--checkpoint", str(checkpoint), "--output", str(output), "--format", "diffusers"]) == 1
    assert not output.exists() or not (output / WEIGHTS).exists()
    return capsys.readouterr().err


class Payload:
    def __reduce__(self):
        return print, ("code in a checkpoint has run",)


def test_a_checkpoint_that_names_code_is_refused_before_it_runs(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", base, weights_of(base))
    torch.save({"optimizer_state_dict": Payload()}, folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert "print" in fail(capsys, folder, tmp_path / "out")
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(pickle.dumps(Payload()))
    assert "damaged" in fail(capsys, folder, tmp_path / "out")
    assert "has run" not in capsys.readouterr().out


def test_a_missing_rank_is_an_error(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", base, weights_of(base))
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert "Expected 2" in fail(capsys, folder, tmp_path / "out")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    assert "is the copy complete" in fail(capsys, folder, tmp_path / "out")


def test_a_checkpoint_must_fit_the_model_that_the_run_started_from(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_of(base)
    weights.pop("proj_out.bias")
    assert "proj_out.bias" in fail(capsys, write_run(tmp_path / "less", base, weights), tmp_path / "out")
    foreign = {f"blocks.99.attn1.to_q.lora_{half}.default.weight": torch.zeros(4, 4) for half in "AB"}
    assert "blocks.99" in fail(capsys, write_run(tmp_path / "other", base, foreign, LORA), tmp_path / "out")


def test_a_folder_without_a_checkpoint_is_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a checkpoint" in fail(capsys, tmp_path, tmp_path / "out")
    (tmp_path / "checkpoints").mkdir()
    assert "no complete checkpoint" in fail(capsys, tmp_path, tmp_path / "out")
    folder = write_run(tmp_path / "run", base, weights_of(base))
    (tmp_path / "run" / "config.yaml").unlink()
    assert "config.yaml is missing" in fail(capsys, folder, tmp_path / "out")


def test_an_existing_folder_is_never_overwritten(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", base, weights_of(base))
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("kept")
    assert "is not empty" in fail(capsys, folder, output)
    assert [path.name for path in output.iterdir()] == ["mine"]
