"""Folders whose weights are not what they claim to be: each is refused by name, whole or sharded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bpgo_video import __main__ as console
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed.ds_config import tensor_files
from bpgo_video.files import resolve_folder
from bpgo_video.inference.model_files import write_weights
from bpgo_video.planning.models import find_model
from bpgo_video.policies import load_policy
from bpgo_video.policies.networks import networks_of
from bpgo_video.weights import WeightsError, check_finite, check_stored, load_network
from tests.distributed.conftest import run_ranks

TINY = resolve_folder("package:bpgo_video.tiny/weights/wan")
PARTS = {  # a part -> a weight of it
    "text_encoder": "encoder.block.0.layer.0.SelfAttention.k.weight",
    "vae": "decoder.conv_in.weight",
    "transformer": "blocks.1.attn1.to_q.weight",
}
Tensors = dict[str, Tensor]


def changed(value: Callable[[Tensor], Tensor]) -> Callable[[Tensors, str], Tensors]:
    return lambda tensors, name: {**tensors, name: value(tensors[name]).contiguous()}


def last_is(number: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.flatten().index_fill(0, torch.tensor(-1), number).view(tensor.shape)


DAMAGES: dict[str, tuple[Callable[[Tensors, str], Tensors], str]] = {
    "missing": (
        lambda tensors, name: {key: one for key, one in tensors.items() if key != name},
        "lacks 1 of .* {name};",
    ),
    "unknown": (lambda tensors, name: {**tensors, f"{name}.old": torch.ones(2)}, "does not have: {name}.old;"),
    "shape": (changed(lambda tensor: tensor[:-1]), r"{name} has shape \[\d+, .*needs \["),
    "nan": (changed(last_is(float("nan"))), "{name} holds nan, but weights must be finite"),
    "infinity": (changed(last_is(float("-inf"))), "{name} holds -inf, but weights must be finite"),
    "integers": (changed(lambda tensor: tensor.to(torch.int32)), "{name} is I32, but weights must be F64, F32, F16"),
    "float8": (changed(lambda tensor: tensor.to(torch.float8_e4m3fn)), "{name} is F8_E4M3, but weights must be"),
}


def damaged(folder: Path, part: str, damage: str) -> str:
    """Write the embedded policy with one damaged part to `folder`; a pattern of the message that refuses it."""
    copytree(TINY, folder)
    file, name = next((folder / part).glob("*.safetensors")), PARTS[part]
    change, message = DAMAGES[damage]
    save_file(change(load_file(file), name), file, metadata={"format": "pt"})
    return message.format(name=name.replace(".", r"\."))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_tensor_is_named(part: str, damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = damaged(tmp_path / "wan", part, damage)
    with pytest.raises(WeightsError, match=rf"{part}.*{message}.*download the folder again"):
        load_policy(str(tmp_path / "wan"), max_sequence_length=8, components=(part,))
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage not in ("nan", "infinity")])
def test_headers_alone_show_what_a_sharded_build_refuses(damage: str, tmp_path: Path) -> None:
    message = damaged(tmp_path / "wan", "transformer", damage)
    folder = tmp_path / "wan" / "transformer"
    network = networks_of(folder.parent)["transformer"]
    with pytest.raises(WeightsError, match=message):
        check_stored(network, folder, tensor_files(folder, network))


@pytest.mark.slow
def test_a_sharded_build_ends_on_every_rank(tmp_path: Path) -> None:
    patterns = {damage: damaged(tmp_path / damage, "transformer", damage) for damage in ("nan", "shape", "missing")}
    copytree(TINY, tmp_path / "intact")
    copytree(TINY, tmp_path / "one" / "0")
    patterns["one"] = damaged(tmp_path / "one" / "1", "vae", "nan")  # the copy of rank 1 alone
    folders = [str(tmp_path / name) for name in (*patterns, "intact")]
    run_ranks(2, [str(tmp_path), *folders], worker="weights_worker")
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for damage, pattern in patterns.items():
            with pytest.raises(ValueError, match=pattern):
                raise ValueError(found[damage])
        assert found["intact"] == "none"


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    network, folder = networks_of(TINY)["transformer"], tmp_path / "transformer"

    def refused(message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            load_network(network, folder, torch.float32)

    refused("transformer/config.json does not exist; download the folder again")
    copytree(TINY / "transformer", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # no mapping of the file
    file.write_bytes(file.read_bytes()[:-1])
    refused("diffusion_pytorch_model.safetensors is damaged .*; download it again")
    file.write_text("version https://git-lfs.github.com/spec/v1")
    refused("diffusion_pytorch_model.safetensors is damaged .*; download it again")
    file.unlink()
    refused("transformer holds no weights, .*; download the folder again")
    write_weights(tensors.items(), folder, shard_bytes=10**6)
    load_network(network, folder, torch.float32)
    next(folder.glob("*-00002-of-*.safetensors")).unlink()
    refused(r"lacks diffusion_pytorch_model-00002-of-\d+\.safetensors, which its .*index\.json names")
    (folder / "config.json").write_text("{")
    refused("transformer/config.json is not JSON.*; download it again")


@pytest.mark.parametrize(
    ("part", "setting", "value", "message"),
    [
        ("transformer", "num_layers", -3, "transformer/config.json: num_layers is -3, but it must be a number above 0"),
        ("transformer", "num_layers", "four", "num_layers is 'four', but it must be a number above 0"),
        ("transformer", "num_layers", 0, "does not have: blocks.0.attn1.norm_k.weight, .* and 105 more"),
        ("transformer", "num_layers", None, "transformer/config.json makes no WanTransformer3DModel"),
        ("transformer", "patch_size", [1, "x", 2], "transformer/config.json makes no WanTransformer3DModel"),
        ("vae", "base_dim", "x", "vae/config.json: base_dim is 'x', but it must be a number above 0"),
        ("text_encoder", "num_layers", "x", "text_encoder/config.json makes no UMT5EncoderModel .*num_layers"),
        ("text_encoder", "num_layers", 0, "does not have: encoder.block.0.*"),
    ],
)
def test_a_wrong_config_is_named(part: str, setting: str, value: object, message: str, tmp_path: Path) -> None:
    copytree(TINY, tmp_path / "wan")
    file = tmp_path / "wan" / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    with pytest.raises(WeightsError, match=rf"{message}.*; download the folder again") as caught:
        load_policy(str(tmp_path / "wan"), max_sequence_length=8, components=(part,))
    assert "\n" not in str(caught.value)


def test_other_variants_of_the_weights_in_a_folder_are_not_read(tmp_path: Path) -> None:
    copytree(TINY / "transformer", tmp_path / "transformer")
    save_file(
        {"x": torch.ones(2).to(torch.int8)}, tmp_path / "transformer" / "diffusion_pytorch_model.int8.safetensors"
    )
    network = networks_of(TINY)["transformer"]
    load_network(network, tmp_path / "transformer", torch.float32)
    assert "x" not in tensor_files(tmp_path / "transformer", network)


def test_a_policy_without_a_part_that_it_names_is_refused(tmp_path: Path) -> None:
    copytree(TINY, tmp_path / "wan", ignore=ignore_patterns("text_encoder"))
    with pytest.raises(WeightsError, match=r"text_encoder/config\.json does not exist"):
        load_policy(str(tmp_path / "wan"), max_sequence_length=8)
    load_policy(str(tmp_path / "wan"), max_sequence_length=8, components=("vae",))


def test_integers_empty_and_unloaded_tensors_are_finite(tmp_path: Path) -> None:
    fine = {"count": torch.ones(2).long(), "empty": torch.ones(0), "unloaded": torch.ones(2, device="meta")}
    check_finite(tmp_path, fine.items())


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("num_layers", "four", "config.json: num_layers is 'four', but it must be a number above 0"),
        ("num_layers", 0, "config.json makes a transformer without blocks"),
        ("num_attention_heads", None, "config.json makes no WanTransformer3DModel"),
    ],
)
def test_a_plan_refuses_a_wrong_config(setting: str, value: object, message: str, tmp_path: Path) -> None:
    copytree(TINY, tmp_path / "wan")
    file = tmp_path / "wan" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    with pytest.raises(WeightsError, match=message):
        find_model(str(tmp_path / "wan"))


@pytest.mark.parametrize(
    ("part", "named", "message"),
    [
        ("transformer", ["os", "system"], r"names \['os', 'system'\] as its transformer, .* diffusers or transformers"),
        ("tokenizer", ["my_package", "Tokenizer"], "as its tokenizer, but parts must be classes of diffusers"),
        ("vae", ["diffusers", "AutoencoderOfTomorrow"], "names AutoencoderOfTomorrow as its vae, which diffusers .*"),
        ("vae", ["diffusers", "utils"], "names utils as its vae, which diffusers .* does not have"),
        ("transformer", [None, None], "model_index.json names no transformer"),
    ],
)
def test_an_index_names_classes_of_two_libraries_alone(
    part: str, named: list[str | None], message: str, tmp_path: Path
) -> None:
    copytree(TINY, tmp_path / "wan")
    index = tmp_path / "wan" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), part: named}))
    with pytest.raises(ConfigError, match=message):
        load_policy(str(tmp_path / "wan"), max_sequence_length=8, components=())


SIZE = "--num-frames 5 --height 32 --width 32 --num-steps 2"
COMMANDS = {  # the damaged part -> a command that loads it
    "text_encoder": "prompts build --input {prompts} --output {output} --policy {folder} --max-sequence-length 8",
    "transformer": "generate --policy {folder} --prompts {prompts} --output {output} --seed 0 " + SIZE,
}


@pytest.mark.parametrize("part", COMMANDS)
def test_commands_end_with_one_sentence(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged(tmp_path / "wan", part, "missing")
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red square\n")
    words = COMMANDS[part].format(prompts=prompts, output=output, folder=tmp_path / "wan").split()
    assert console.main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert PARTS[part] in errors[0]
    assert not list(output.glob("*.tar")) + list(output.glob("*.mp4"))


def test_a_repaired_folder_generates_into_the_output_of_the_failed_command(tmp_path: Path) -> None:
    damaged(tmp_path / "wan", "vae", "nan")
    (tmp_path / "prompts.txt").write_text("a red square\n")
    words = COMMANDS["transformer"].format(
        prompts=tmp_path / "prompts.txt", output=tmp_path / "out", folder=tmp_path / "wan"
    )
    assert console.main(words.split()) == 2
    copytree(TINY, tmp_path / "wan", dirs_exist_ok=True)
    assert console.main(words.split()) == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1
