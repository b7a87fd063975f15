"""Publishing an export: huggingface's own client against a stand-in for the hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors import safe_open

from bpgo_video.commands.convert import main
from tests.inference.test_conversion import LORA, adapted_run
from tests.made.random_wan import random_wan
from tests.made.stub_hub import StubHub, stub_hub


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_wan(tmp_path_factory.mktemp("policy") / "wan")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """The hub, and a client that is online, logged in, and uploads by plain HTTP."""
    with stub_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def publish(checkpoint: Path, output: Path, *flags: str, form: str = "lora") -> int:
    where = ["--checkpoint", str(checkpoint), "--output", str(output), "--format", form]
    return main([*where, "--push-to-hub", "my-lab/wan-bpgo", *flags])


@pytest.mark.parametrize("form", ["diffusers", "lora", "comfyui"])
def test_an_export_is_uploaded_whole_and_nothing_else_is(
    form: str, base: Path, tmp_path: Path, hub: StubHub, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = adapted_run(base, tmp_path, LORA)
    assert publish(checkpoint, tmp_path / "out", "--private", form=form) == 0
    assert capsys.readouterr().out.endswith(f"\n{hub.url}/my-lab/wan-bpgo/tree/main\n")
    assert hub.private == {"my-lab/wan-bpgo": True}
    uploaded = hub.branches["my-lab/wan-bpgo", "main"]
    export = tmp_path / "out"
    assert uploaded == {
        str(path.relative_to(export)): path.read_bytes() for path in export.rglob("*") if path.is_file()
    }
    assert {"diffusers": "model_index.json", "lora": "pytorch_lora_weights.safetensors"}.get(
        form, "README.md"
    ) in uploaded
    assert not any(name.endswith((".pt", ".bin", ".yaml")) for name in uploaded), "no states of optimizers"
    assert not any(hub.token.encode() in content for content in uploaded.values())
    for name, content in uploaded.items():
        if name.endswith(".safetensors"):
            with safe_open(export / name, framework="pt") as file:
                content = json.dumps(file.metadata()).encode()
        for secret in (str(tmp_path), str(base), hub.token):
            assert secret.encode() not in content, f"{name} names {secret}"
    card = uploaded["README.md"].decode()
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-video\n")
    assert "# wan after 2 steps of BPGO" in card
    assert "base_model" not in card.partition("\n---\n")[0], "a folder of this machine is no model of the hub"


def test_a_branch_is_created_for_the_upload(base: Path, tmp_path: Path, hub: StubHub) -> None:
    checkpoint, _ = adapted_run(base, tmp_path, LORA)
    hub.private["my-lab/wan-bpgo"] = False
    hub.branches["my-lab/wan-bpgo", "main"] = {"kept": b""}
    assert publish(checkpoint, tmp_path / "out", "--revision", "step-2") == 0
    assert set(hub.branches["my-lab/wan-bpgo", "main"]) == {"kept"}
    assert set(hub.branches["my-lab/wan-bpgo", "step-2"]) == {"README.md", "pytorch_lora_weights.safetensors"}


def offline(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def no_login(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_login(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")


def read_only(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refusals.update({"/api/repos/create": 403, "/api/models": 404})


def public(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private["my-lab/wan-bpgo"] = False


def no_hub(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (offline, "HF_HUB_OFFLINE forbids the network; set HF_HUB_OFFLINE=0"),
        (no_login, "there is no login for the hub; type `hf auth login`, or set HF_TOKEN"),
        (wrong_login, "the hub does not accept the login; type `hf auth login`, or set HF_TOKEN"),
        (read_only, "make a token that may at https://huggingface.co/settings/tokens, and type `hf auth login`"),
        (public, "exists and is public; name another repository, or omit --private"),
        (no_hub, "refused; then repeat the command"),
    ],
)
def test_what_forbids_the_upload_is_one_sentence_before_any_work(
    change, message: str, base: Path, tmp_path: Path, hub: StubHub, monkeypatch, capsys
) -> None:
    change(hub, monkeypatch)
    checkpoint, _ = adapted_run(base, tmp_path, LORA)
    assert publish(checkpoint, tmp_path / "out", "--private") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: my-lab/wan-bpgo")
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("request_", ["/lfs/", "/api/models/my-lab/wan-bpgo/commit"])
def test_after_a_failed_upload_the_export_stays_with_the_command_that_uploads_it(
    request_: str, base: Path, tmp_path: Path, hub: StubHub, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = adapted_run(base, tmp_path, LORA)
    hub.refusals[request_] = 403
    assert publish(checkpoint, tmp_path / "out", "--revision", "one") == 2
    again = f"`hf upload my-lab/wan-bpgo {tmp_path / 'out'} --revision one` uploads it\n"
    assert capsys.readouterr().err.endswith(again)
    assert (tmp_path / "out" / "README.md").is_file()


def test_an_export_that_names_a_folder_of_this_machine_is_not_uploaded(
    tmp_path: Path, hub: StubHub, capsys: pytest.CaptureFixture[str]
) -> None:
    base = random_wan(tmp_path / "wan")
    config = json.loads((base / "vae" / "config.json").read_text())
    (base / "vae" / "config.json").write_text(json.dumps({**config, "_name_or_path": str(base / "vae")}))
    checkpoint, _ = adapted_run(base, tmp_path, LORA)
    assert publish(checkpoint, tmp_path / "out", form="diffusers") == 2
    assert f"{tmp_path / 'out' / 'vae' / 'config.json'} names {base}, and nothing" in capsys.readouterr().err
    assert hub.branches == {("my-lab/wan-bpgo", "main"): {}}


@pytest.mark.parametrize("flags", [["--private"], ["--revision", "one"]])
def test_flags_of_an_upload_need_one(
    flags: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(tmp_path), "--output", "out", "--format", "lora", *flags]) == 2
    assert "add --push-to-hub ORG/NAME" in capsys.readouterr().err
