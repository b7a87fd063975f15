"""The scripts in examples/ run as a user copies them, and the tutorials show them as they are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.made.recipes import ROOT

EXAMPLES = ROOT / "examples"
BLOCK = re.compile(r'^```\w+ title="(?P<path>[^"]+)"\n(?P<text>.*?)^```$', re.DOTALL | re.MULTILINE)
PAGES = sorted((ROOT / "docs" / "tutorial").glob("*.md"))
SHORT = ["--run.num-steps", "2", "--rollout.prompts-per-step", "2", "--evaluation.samples-per-prompt", "1"]
SCRIPTS = [  # a script, its arguments, and files that it leaves
    ("first_reward/run.sh", SHORT, ["runs/size/report.html"]),
    ("own_prompts.sh", SHORT, ["runs/my-run/report.html"]),
    ("noisy_rewards/run.sh", SHORT, ["runs/compared/report.html"]),
    ("lora.sh", SHORT, ["my-lora/pytorch_lora_weights.safetensors", "videos/00000-00.mp4"]),
]


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command `bpgo-video` of this checkout."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "bpgo-video").write_text(f'#!/bin/sh\nexec {sys.executable} -m bpgo_video "$@"\n')
    (folder / "bpgo-video").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def prepared(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and priors of `bpgo-video demo --prepare`, which scripts that ask for them find."""
    folder = tmp_path_factory.mktemp("prepared")
    subprocess.run([binaries / "bpgo-video", "demo", "--prepare"], cwd=folder, check=True)
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments", "left"), SCRIPTS, ids=[script for script, _, _ in SCRIPTS])
def test_a_script_runs_on_the_embedded_policy(
    script: str, arguments: list[str], left: list[str], binaries: Path, prepared: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(EXAMPLES / Path(script).parent, folder)
    shutil.copytree(prepared, folder / "runs")
    variables = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = ["bash", Path(script).name, *arguments]
    result = subprocess.run(command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not [name for name in left if not (folder / name).is_file()]
    for summary in folder.glob("runs/*/summary.json"):
        command = [sys.executable, EXAMPLES / "read_report.py", summary.parent]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("1. Did it help?")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_shows_files_as_they_are(page: Path) -> None:
    blocks = list(BLOCK.finditer(page.read_text()))
    differing = [block["path"] for block in blocks if block["text"] not in (ROOT / block["path"]).read_text()]
    assert not differing
    assert len(page.read_text().splitlines()) <= 130, "two screens"
