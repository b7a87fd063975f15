"""Conversion of checkpoints to model folders: joined shards, merged adapters, verification, and refusal of damage.

The checkpoints are synthetic, in ZeRO-2's layout; tests/distributed converts those of real runs.
"""

from __future__ import annotations

import hashlib
import pickle
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from huggingface_hub import ModelCard
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bpgo_video.commands.convert import main
from bpgo_video.config.policy import LoraConfig
from bpgo_video.config.reading import to_yaml
from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.distributed.zero_files import verify_universal
from bpgo_video.files import fingerprint
from bpgo_video.inference.conversion import FORMATS, Conversion, convert, verify_output
from bpgo_video.inference.hub import this_code
from bpgo_video.inference.run_weights import find_checkpoint
from bpgo_video.policies.lora import add_lora, merged_parameters, merged_tensors
from bpgo_video.policies.networks import Transformers
from tests.made.random_wan import LATENTS, TEXT_TOKENS, random_wan
from tests.made.recipes import small_recipe
from tests.made.zero_checkpoints import CODE, seal, write_average, write_checkpoint

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
LORA = LoraConfig(rank=4, alpha=8)
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "linear_1", "linear_2", "time_proj", "proj_out")
EVERYWHERE = LoraConfig(rank=4, alpha=2, target_modules=LINEAR)
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


def adapted_transformer(base: Path, lora: LoraConfig = LORA) -> WanTransformer3DModel:
    """The base transformer with adapters that are not zero."""
    model = WanTransformer3DModel.from_pretrained(base / "transformer")
    add_lora(model, lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def write_run(run_dir: Path, base: Path, tensors: Tensors, lora: LoraConfig | None = None, stage: int = 2) -> Path:
    """Write a run folder with one checkpoint of two ranks; return the checkpoint's folder."""
    config = small_recipe(run_dir, run_dir / "shards", policy={"folder": str(base), "lora": lora or LoraConfig()})
    folder = run_dir / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "checkpoints" / "latest").write_text(folder.name)
    named = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    return write_checkpoint(folder, [named], stage, moments=[named, named] if stage == 3 else None)


def converted(checkpoint: Path, output: Path, form: str = "diffusers", verify: bool = True, **options: Any) -> Path:
    convert(Conversion(find_checkpoint(checkpoint), "raw", output, **options), form, verify)
    return output


def test_shards_of_all_ranks_are_joined_bit_for_bit(
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
    assert (output / "README.md").is_file()
    others = [path.relative_to(base) for path in base.rglob("*") if path.is_file()]
    for path in set(others) - {WEIGHTS}:
        assert (output / path).read_bytes() == (base / path).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "run"]


def test_the_average_is_converted_like_the_weights(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", base, weights_of(base))
    arguments = ["--checkpoint", str(folder), "--output", str(tmp_path / "out"), "--format", "diffusers", "--verify"]
    assert main([*arguments, "--weights", "ema"]) == 2
    assert "kept no average" in capsys.readouterr().err
    average = trained_weights(base)
    write_average(folder, {f"transformer.{name}": tensor for name, tensor in average.items()})
    assert main([*arguments, "--weights", "ema"]) == 0
    found = weights_of(tmp_path / "out")
    assert all(torch.equal(found[name], average[name]) for name in average)


def test_bfloat16_rounds_all_weights_but_those_that_diffusers_keeps_in_fp32(base: Path, tmp_path: Path) -> None:
    trained = trained_weights(base)
    checkpoint = write_run(tmp_path / "run", base, trained)
    found = load_file(converted(checkpoint, tmp_path / "out", dtype=torch.bfloat16) / WEIGHTS)
    pipeline = WanTransformer3DModel.from_pretrained(base / "transformer", torch_dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in pipeline.named_parameters()}
    assert {found[name].dtype for name in found} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(found[name], trained[name].to(dtypes[name])) for name in trained)


def test_merged_adapters_give_the_same_output(base: Path, tmp_path: Path) -> None:
    model = adapted_transformer(base)
    adapters = {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}
    output = converted(write_run(tmp_path / "run", base, adapters, LORA), tmp_path / "out")
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


def test_merging_tensors_equals_merging_modules(base: Path) -> None:
    model = adapted_transformer(base)

    class Whole:
        module = Transformers({"transformer": model})

        @contextmanager
        def gathered(self, parameters):
            yield

    expected = dict(merged_parameters(Whole(), "transformer"))
    adapters = {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}
    found = dict(merged_tensors(weights_of(base).items(), adapters, LORA))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("change", ["tensor", "missing", "file"])
def test_verify_detects_modified_weights(base: Path, tmp_path: Path, change: str) -> None:
    trained = trained_weights(base)
    job = Conversion(find_checkpoint(write_run(tmp_path / "run", base, trained)), "raw", tmp_path / "out")
    convert(job, "diffusers")
    output = job.output
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
        verify_output(job, "diffusers")


def fail(capsys: pytest.CaptureFixture[str], checkpoint: Path, output: Path) -> str:
    assert main(["--checkpoint", str(checkpoint), "--output", str(output), "--format", "diffusers"]) == 2
    assert not output.exists() or not (output / WEIGHTS).exists()
    return capsys.readouterr().err


class Payload:
    def __reduce__(self):
        return print, ("code in a checkpoint has run",)


def test_a_checkpoint_with_pickled_code_is_refused_before_it_runs(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", base, weights_of(base))
    torch.save({"optimizer_state_dict": Payload()}, folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    seal(folder)
    assert "print" in fail(capsys, folder, tmp_path / "out")
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(pickle.dumps(Payload()))
    seal(folder)
    assert "damaged" in fail(capsys, folder, tmp_path / "out")
    assert "has run" not in capsys.readouterr().out


def test_a_missing_rank_is_an_error(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", base, weights_of(base))
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    seal(folder)
    assert "written by 2 ranks" in fail(capsys, folder, tmp_path / "out")
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    seal(folder)
    assert "is the copy complete" in fail(capsys, folder, tmp_path / "out")


def test_a_checkpoint_must_match_the_starting_model_of_its_run(
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


def adapted_run(base: Path, tmp_path: Path, lora: LoraConfig) -> tuple[Path, WanTransformer3DModel]:
    model = adapted_transformer(base, lora)
    adapters = {name: parameter.detach() for name, parameter in model.named_parameters() if ".lora_" in name}
    return write_run(tmp_path / "run", base, adapters, lora), model


@pytest.mark.parametrize("form", ["lora", "comfyui"])
@pytest.mark.parametrize("lora", [LORA, EVERYWHERE], ids=["attention", "everywhere"])
def test_a_lora_file_generates_the_video_of_the_merged_model(
    base: Path, tmp_path: Path, form: str, lora: LoraConfig
) -> None:
    """By diffusers' pipeline: load_lora_weights on the base model, against the merged export."""
    checkpoint, _ = adapted_run(base, tmp_path, lora)
    output = converted(checkpoint, tmp_path / "lora", form)
    merged = WanPipeline.from_pretrained(converted(checkpoint, tmp_path / "merged"))
    adapted, plain = (WanPipeline.from_pretrained(base) for _ in range(2))
    adapted.load_lora_weights(output)
    inputs = {
        "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 1.0,
        "max_sequence_length": TEXT_TOKENS, "output_type": "latent", "latents": torch.randn(1, *LATENTS),
    }  # fmt: skip
    expected, found, before = (pipe("a red circle", **inputs).frames for pipe in (merged, adapted, plain))
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert (before - expected).norm() / expected.norm() > 1e-3


def test_diffusers_reads_the_comfyui_layout(base: Path, tmp_path: Path) -> None:
    """Names are those of the original code; diffusers' converter restores each adapter (alpha / rank in one factor)."""
    checkpoint, model = adapted_run(base, tmp_path, EVERYWHERE)
    found = load_file(converted(checkpoint, tmp_path / "comfy", "comfyui") / "pytorch_lora_weights.safetensors")
    for layer in ("blocks.1.self_attn.q", "blocks.0.cross_attn.o", "blocks.1.ffn.0", "blocks.0.ffn.2"):
        assert float(found[f"diffusion_model.{layer}.alpha"]) == EVERYWHERE.alpha
    for layer in ("text_embedding.0", "time_embedding.2", "time_projection.1", "head.head"):
        assert f"diffusion_model.{layer}.lora_up.weight" in found
    back = _convert_non_diffusers_wan_lora_to_diffusers(found)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert len(back) == 2 * len(layers)
    for name, layer in layers.items():
        down, up = (back[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
        assert torch.allclose(up @ down, layer.get_delta_weight("default"), atol=1e-6)


def test_adapters_are_exported_with_their_alpha(base: Path, tmp_path: Path) -> None:
    checkpoint, model = adapted_run(base, tmp_path, LORA)
    found = load_file(converted(checkpoint, tmp_path / "lora", "lora") / "pytorch_lora_weights.safetensors")
    expected = {name: tensor for name, tensor in model.named_parameters() if ".lora_" in name}
    assert found.keys() == {f"transformer.{name.replace('.default.', '.')}" for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(found[f"transformer.{name.replace('.default.', '.')}"], tensor)
    pipeline = WanPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "lora", adapter_name="run")
    settings = pipeline.transformer.peft_config["run"]
    assert (settings.r, settings.lora_alpha) == (LORA.rank, LORA.alpha)


def test_exporting_adapters_of_a_run_without_adapters_is_an_error(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_run(tmp_path / "run", base, weights_of(base))
    assert main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--format", "lora"]) == 2
    assert "trained all weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verify_detects_a_modified_adapter(base: Path, tmp_path: Path) -> None:
    checkpoint, _ = adapted_run(base, tmp_path, LORA)
    job = Conversion(find_checkpoint(checkpoint), "raw", converted(checkpoint, tmp_path / "lora", "lora"))
    file = job.output / "pytorch_lora_weights.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["transformer.blocks.1.attn2.to_v.lora_B.weight"][0, 0] += 1
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn2\.to_v"):
        verify_output(job, "lora")


def test_the_transformer_can_be_exported_alone_and_in_shards(base: Path, tmp_path: Path) -> None:
    trained = trained_weights(base)
    checkpoint = write_run(tmp_path / "run", base, trained)
    output = converted(checkpoint, tmp_path / "out", transformer_only=True, shard_bytes=20_000)
    assert len(list(output.glob("diffusion_pytorch_model-*.safetensors"))) > 1
    found = WanTransformer3DModel.from_pretrained(output).state_dict()
    assert all(torch.equal(found[name], trained[name]) for name in trained)


def test_the_model_card_describes_the_training_and_lists_the_files(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    output = converted(write_run(tmp_path / "run", base, trained_weights(base)), tmp_path / "out")
    (base / "README.md").unlink()
    card = ModelCard.load(output / "README.md")
    assert card.data.license == "apache-2.0"
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-video")
    assert "after 2 steps of BPGO" in card.text
    digest = hashlib.sha256((output / WEIGHTS).read_bytes()).hexdigest()
    assert f"| {WEIGHTS} | `{digest}` |" in card.text
    assert fingerprint(base, ("transformer",)) in card.text
    assert f"| trained by | {CODE} |" in card.text
    assert f"| written by | {this_code()} |" in card.text


def test_a_universal_checkpoint_has_the_weights_of_the_checkpoint(base: Path, tmp_path: Path) -> None:
    trained = {f"transformer.{name}": tensor for name, tensor in trained_weights(base).items()}
    checkpoint = write_run(tmp_path / "run", base, trained_weights(base), stage=3)
    output = converted(checkpoint, tmp_path / "universal", "universal")
    assert "DeepSpeed's universal checkpoint" in (output / "README.md").read_text()
    name = "transformer.blocks.0.attn1.to_q.weight"
    torch.save(trained[name].flatten() + 1, output / "zero" / name / "fp32.pt")
    with pytest.raises(CheckpointError, match=name):
        verify_universal(trained, output)


@pytest.mark.parametrize(
    ("form", "lora"),
    [(form, lora) for form in FORMATS for lora in (LoraConfig(), LORA) if form != "lora" or lora.rank],
    ids=str,
)
def test_trained_weights_that_are_not_finite_are_named(
    base: Path, tmp_path: Path, form: str, lora: LoraConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted_transformer(base) if lora.rank else WanTransformer3DModel.from_pretrained(base / "transformer")
    trained = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    name = sorted(trained)[2]
    trained[name].view(-1)[-1] = float("inf")
    folder = write_run(tmp_path / "run", base, trained, lora)
    assert main(["--checkpoint", str(folder), "--output", str(tmp_path / "out"), "--format", form]) == 2
    message = capsys.readouterr().err
    assert f"step-000002: transformer.{name} holds inf, but weights must be finite" in message
    assert "name an earlier checkpoint" in message
    assert not (tmp_path / "out").exists()
