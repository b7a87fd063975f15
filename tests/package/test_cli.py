"""Command-line errors: invalid flags and values are named once per host, with the remedy."""

from __future__ import annotations

import argparse
import ast
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bpgo_video.cli import Parser, device, print_error, run_command
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.errors import some_of, unknown
from tests.made.recipes import ROOT


def parser() -> Parser:
    top = Parser(prog="tool")
    commands = top.add_subparsers(required=True)
    strict = commands.add_parser("build")
    strict.add_argument("--output", required=True)
    strict.add_argument("--device", type=device, default="cpu")
    strict.set_defaults(run=lambda args: None)
    loose = commands.add_parser("layout", allow_abbrev=False)
    loose.add_argument("--output", required=True)
    loose.set_defaults(run=lambda args: None, more=[])
    return top


def refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(words.split())
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("build --outptu x", "tool build: error: --outptu: unknown flag; perhaps you meant --output; --help lists all"),
        ("build --outptu=x", "--outptu: unknown flag; perhaps you meant --output"),
        ("build --output x --zzz 3", "--zzz: unknown flag; --help lists all"),
        (
            "build --output x --data.shards y",
            "--data.shards is a flag of recipes, which this command does not take",
        ),
        ("build", "the following arguments are required: --output"),
        ("build --output x --device gpu", "argument --device: 'gpu' is no device; write cpu, cuda or cuda:1"),
        ("build --output x --device cuda:x", "'cuda:x' is no device"),
    ],
)
def test_an_invalid_flag_is_named(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(words, capsys)


def test_valid_flags_are_accepted() -> None:
    for words in ("build --output x --device cuda:1", "build --outp x", "build --output=x"):
        assert parser().parse_known_args(words.split())[0].output == "x"
    assert run_command(parser(), ["layout", "--output", "x", "--num-steps", "3"]) == 0, "flags of another command"


def test_error_messages_list_known_names_and_shorten_long_lists() -> None:
    assert unknown("solver", "eular", ["ddim", "euler"]) == (
        "solver is 'eular'; known are ddim, euler; perhaps you meant euler"
    )
    assert unknown("--reward", "x", [], ", or module:Name") == "--reward is 'x'; known are none, or module:Name"
    assert (some_of("cab"), some_of("edcba")) == ("a, b, c", "a, b, c and 2 more")


def test_only_one_rank_per_host_prints_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--outptu: unknown flag" in refused("build --outptu x", capsys)
    assert refused("build --outptu x", capsys) == "", "another rank has printed it"
    print_error(ValueError("wrong"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "code"), [(ConfigError("a rule"), 2), (ValueError("a file"), 1)])
def test_configuration_errors_have_a_different_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise error

    command = Parser()
    command.set_defaults(run=fail)
    assert run_command(command, []) == code
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    "words",
    [
        "tools/make_prompt_shards.py build --input a.txt --output b --policy p",
        "tools/make_video_shards.py build --input a --output b --policy p --num-frames 9 --height 8 --width 8 --fps 8",
        "tools/serve_rewards.py --config recipe.yaml --reward motion --port 0",
        "tools/evaluate.py score --videos v --dimensions temporal_flickering --output o.json",
        "tools/evaluate.py vbench --python python --videos v --output o",
    ],
)
def test_tools_refuse_an_invalid_device(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(f"{words} --device gpu", monkeypatch) == 2
    assert "'gpu' is no device; write cpu, cuda or cuda:1" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["pipelines/train_video.py", "tools/doctor.py", "tools/estimate_priors.py"])
def test_the_help_text_is_the_docstring_of_the_tool(
    tool: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(f"{tool} --help", monkeypatch) == 0
    shown = capsys.readouterr().out
    docstring = ast.get_docstring(ast.parse((ROOT / tool).read_text())) or ""
    for line in (docstring.splitlines()[0], docstring.splitlines()[2].strip(), "RECIPE      a YAML file"):
        assert line in shown


def test_plan_memory_shows_its_exit_codes_and_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("tools/plan_memory.py --help", monkeypatch) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "1 if on none, 2 if",
        "3 if it may fit, but the size of a reward model is not known",
        "24 40 80 141)",
        "is reached (0.4)",
        "ranks of the whole run",
        "--parallel.sequence",
    ):
        assert words in shown


def run(words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a tool as a program in this process; return its exit code."""
    script, *arguments = words.split()
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return int(stopped.value.code or 0)


def test_a_benchmark_module_names_the_command_that_runs_it() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tools.bench.overlap", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "run python -m tools.bench --recipe" in result.stderr
