"""The console command `bpgo-video`: its commands, its help, and launching of ranks."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bpgo_video import __main__ as console
from bpgo_video.commands import convert, evaluate, shipped
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.reading import read_yaml, to_yaml
from bpgo_video.data.reader import PromptShards
from bpgo_video.distributed import process_group
from bpgo_video.distributed.launcher import devices
from bpgo_video.inference import conversion
from bpgo_video.inference.run_weights import DTYPES, WEIGHTS
from tests.made.recipes import ROOT

SCRIPTS = [*(ROOT / "pipelines").glob("*.py"), *(path for path in (ROOT / "tools").glob("*.py") if path.stat().st_size)]


class Launched(Exception):
    """Raised instead of replacing the process by the launcher."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line that would have replaced this process."""
    command: list[str] = []

    def become(path: str, arguments: list[str]) -> None:
        assert path == sys.executable
        command.extend(arguments)
        raise Launched

    monkeypatch.setattr(os, "execv", become)
    monkeypatch.delenv("RANK", raising=False)
    return command


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from bpgo_video.__main__ import main; assert main(['--help']) == 0; "
        "assert not {'torch', 'deepspeed', 'pydantic', 'numpy'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for name, (_, _, line) in console.COMMANDS.items():
        assert f"  {name} " in shown
        assert line in shown


def test_a_misspelt_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["trian", "--config", "x"]) == 2
    assert "trian: unknown command; perhaps you meant train" in capsys.readouterr().err


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_shows_examples_of_its_use(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        console.main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: bpgo-video {name} ")
    assert f"    bpgo-video {name}" in shown


@pytest.mark.parametrize(
    "words", ["recipes copy", "prompts build", "videos verify", *(f"evaluate {name}" for name in evaluate.COMMANDS)]
)
def test_a_subcommand_shows_only_its_examples(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        console.main([*words.split(), "--help"])
    examples = capsys.readouterr().out.partition("examples:\n")[2]
    lines = [line for line in examples.splitlines() if line.startswith("    bpgo-video")]
    assert lines
    assert all(line.startswith(f"    bpgo-video {words} ") for line in lines)


@pytest.mark.parametrize("example", re.findall(r"^    bpgo-video evaluate (.*)", evaluate.__doc__ or "", re.MULTILINE))
def test_the_examples_of_evaluate_have_the_flags_of_its_commands(example: str) -> None:
    assert evaluate.parser().parse_args(example.split()).command == example.split()[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_script_is_a_thin_wrapper_of_a_command(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 20
    (name,) = re.findall(r'sys\.exit\(main\(\["([\w-]+)", \*sys\.argv\[1:\]\], script=__doc__\)\)', script.read_text())
    assert script.read_text().startswith(f'"""`bpgo-video {name}` as a script of the clone.')
    assert name in console.COMMANDS


@pytest.mark.parametrize(
    ("words", "command", "rest"),
    [
        ("train --ranks 2 --config tiny_wan_bpgo", "train", "--config tiny_wan_bpgo"),
        ("train tiny_wan_bpgo --ranks 2", "train", "tiny_wan_bpgo"),
        ("sft --config tiny_wan_sft --ranks=2 --run.dir x", "sft", "--config tiny_wan_sft --run.dir x"),
        ("doctor --config tiny_wan_bpgo --ranks 2", "doctor", "--config tiny_wan_bpgo"),
        ("priors --config tiny_wan_bpgo --ranks 2", "priors", "--config tiny_wan_bpgo"),
        (
            "generate --policy p --prompts q --output o --ranks 2 --seed 0",
            "generate",
            "--policy p --prompts q --output o --seed 0",
        ),
        ("evaluate heldout --ranks 2 --config r.yaml", "evaluate", "heldout --config r.yaml"),
        ("evaluate compare a b --output o --ranks 2", "evaluate", "compare a b --output o"),
        (
            "evaluate layout --output o --suite s --num-steps 3 --ranks 2",
            "evaluate",
            "layout --output o --suite s --num-steps 3",
        ),
        ("prompts build --input a --output b --policy c --ranks 2", "prompts", "build --input a --output b --policy c"),
    ],
)
def test_ranks_are_started_by_the_launcher_on_a_free_port(
    words: str, command: str, rest: str, launched: list[str]
) -> None:
    with pytest.raises(Launched):
        console.main(words.split())
    flags, found = launched[1 : launched.index("--module")], launched[launched.index("--module") :]
    assert flags[:4] == ["-m", "bpgo_video.distributed.launcher", "2", "--log_level=critical"]
    (port,) = [int(flag.partition("=")[2]) for flag in flags if flag.startswith("--master_port=")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
    assert found == ["--module", "bpgo_video", command, *rest.split()]


@pytest.mark.parametrize(
    ("visible", "found"),
    [(None, ["0", "1"]), ("", ["0", "1"]), ("5,7,6", ["5", "7"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])],
)
def test_ranks_take_the_first_visible_devices(visible: str | None, found: list[str]) -> None:
    assert devices(2, visible) == found


def test_too_few_visible_devices_are_named() -> None:
    with pytest.raises(ValueError, match="--ranks 4 needs a GPU for each rank, but CUDA_VISIBLE_DEVICES names 2,3"):
        devices(4, "2,3")


def test_verbose_reaches_the_launcher_and_the_ranks(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "filters", list(logger.filters))
    with pytest.raises(Launched):
        console.main(["train", "tiny_wan_bpgo", "--ranks", "2", "--verbose"])
    assert "--log_level=critical" not in launched
    assert launched[-4:] == ["bpgo_video", "--verbose", "train", "tiny_wan_bpgo"]


def test_invalid_uses_of_ranks_are_refused(
    launched: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, code, message in (
        ("evaluate total results --ranks 2", 2, "--ranks: unknown flag"),
        ("train --config tiny_wan_bpgo --ranks 0", 2, "--ranks: 0 must be 1 or more"),
    ):
        with pytest.raises(SystemExit) as stopped:
            console.main(words.split())
        assert stopped.value.code == code
        assert message in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        console.main(["train", "--config", "tiny_wan_bpgo", "--ranks", "2"])
    assert stopped.value.code == 1
    assert "this process already is rank 1 of one; leave out --ranks" in capsys.readouterr().err
    assert not launched


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sft --config tiny_wan_bpgo", "is a recipe of kind 'bpgo'; this command takes recipes of kind 'sft'"),
        ("priors --config tiny_wan_sft", "is a recipe of kind 'sft'; this command takes recipes of kind 'bpgo'"),
    ],
)
def test_a_recipe_of_another_kind_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        console.main(words.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_convert_has_the_choices_and_defaults_of_what_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    """The command states them without importing it."""
    assert convert.FORMATS.keys() == conversion.FORMATS.keys()
    with pytest.raises(SystemExit):
        convert.main(["--help"])
    shown = capsys.readouterr().out
    assert f"({conversion.SHARD_BYTES / 1e9})" in shown
    assert f"{{{','.join(WEIGHTS)}}}" in shown
    assert f"{{{','.join(DTYPES)}}}" in shown


def test_the_demo_prepares_again_only_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    measured: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        measured.append(command)
        (tmp_path / "demo-prompts" / "priors").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(shipped.subprocess, "run", run)
    words = ["demo", "--dir", str(tmp_path / "demo"), "--seed", "3", "--ranks", "2"]
    for _ in range(2):
        with pytest.raises(Launched):
            console.main(words)
    assert len(measured) == 1, "nothing changed"
    assert launched[-8:] == [
        *("--run.dir", str(tmp_path / "demo"), "--run.seed", "3"),
        *("--data.shards", str(tmp_path / "demo-prompts"), "--run.resume", "auto"),
    ]
    index = tmp_path / "demo-prompts" / "index.json"
    assert len(PromptShards(index.parent)) == 96
    (index.parent / "priors" / "recipe.yaml").write_text(to_yaml(read_yaml(Path("tiny_wan_grpo"))))
    assert console.main([*words, "--prepare"]) == 0
    assert len(measured) == 2, "another recipe"
    index.write_text(index.read_text().replace('"max_sequence_length": 16', '"max_sequence_length": 17'))
    assert console.main([*words, "--prepare"]) == 0
    assert len(measured) == 3, "shards of other settings are built again"
    assert PromptShards(index.parent).policy.max_sequence_length == 16


def test_a_port_in_use_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        names = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=rf"port {port} is in use by another process .* --master_port N"):
            process_group.start_ranks()
