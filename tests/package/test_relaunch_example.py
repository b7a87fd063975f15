"""The loop that repeats a training command: after which exit codes, how often, and what a signal does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.made.recipes import ROOT

SCRIPT = ROOT / "docs" / "examples" / "relaunch.sh"
STUB = """
echo >> launches
n=$(wc -l < launches)
set -- $CODES
[[ $PROGRESS == *" $n "* ]] && mkdir -p run/checkpoints && echo "step-$n" > run/checkpoints/latest
exit ${!n}
"""


def relaunched(folder: Path, codes: str, progress: str = "", restarts: int = 2) -> tuple[int, list[str]]:
    """The exit code, and the lines about restarts, of launches that end with `codes`; those in `progress` save."""
    environment = {**os.environ, "CODES": codes, "PROGRESS": f" {progress} ", "RESTARTS": f"{restarts}", "PAUSE": "0"}
    command = ["bash", str(SCRIPT), "run", "bash", "-c", STUB]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert len((folder / "launches").read_text().splitlines()) == len(codes.split())
    return result.returncode, result.stderr.splitlines()


@pytest.mark.parametrize("code", [0, 2, 143])
def test_success_wrong_input_and_signals_are_not_repeated(tmp_path: Path, code: int) -> None:
    assert relaunched(tmp_path, f"{code}") == (code, [])


def test_failures_without_a_newer_checkpoint_end(tmp_path: Path) -> None:
    code, lines = relaunched(tmp_path, "1 247 1")
    assert code == 1
    assert lines[1] == "relaunch.sh: exit code 247; again in 0 s from the beginning (2 of 2 without progress)"


def test_a_newer_checkpoint_counts_anew(tmp_path: Path) -> None:
    code, lines = relaunched(tmp_path, "1 1 1 1 0", progress="2 3")
    assert code == 0
    assert [line.partition("(")[2][0] for line in lines] == ["1", "1", "1", "2"]


def test_a_signal_reaches_the_processes_of_the_command(tmp_path: Path) -> None:
    stub = "(trap 'touch stopped; exit' TERM; touch ready; sleep 20 & wait) & wait"
    loop = subprocess.Popen(["bash", str(SCRIPT), "run", "bash", "-c", stub], cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        assert loop.poll() is None
    loop.send_signal(signal.SIGTERM)
    assert loop.wait(timeout=10) == 143
    deadline = time.monotonic() + 10
    while not (tmp_path / "stopped").exists():
        assert time.monotonic() < deadline
