"""Kills at random moments, by `tools.torture.kills`: few here, since each chain of them starts its command again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.made.recipes import ROOT, python_path


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_commands_continue_to_the_result_of_undisturbed_ones() -> None:
    command = [sys.executable, "-m", "tools.torture.kills", "--seed", "7", "--count", "8"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("'held'") == 6, "every command was killed, and every chain of kills was compared"
