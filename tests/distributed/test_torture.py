"""Kills at random moments and changed bytes, by `tools.torture`: few here, since each takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.made.recipes import ROOT, python_path


def torture(part: str, count: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tools.torture.{part}", "--seed", "7", "--count", f"{count}"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_commands_continue_to_the_result_of_undisturbed_ones() -> None:
    result = torture("kills", 8)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("'held'") == 6, "every command was killed, and every chain of kills was compared"


@pytest.mark.slow
def test_a_changed_byte_is_found_or_changes_nothing() -> None:
    result = torture("bytes", 40)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resume a run: {'held': 4}" in result.stdout, "from the checkpoint before, with the same result"
