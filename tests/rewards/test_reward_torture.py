"""Wrong requests and kills of a reward server, by `tools.torture.requests`: few here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.made.recipes import ROOT, python_path


@pytest.mark.slow
def test_a_killed_server_answers_right_requests_rightly_and_refuses_wrong_ones() -> None:
    command = [sys.executable, "-m", "tools.torture.requests", "--seed", "7", "--count", "150"]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "requests: afterwards" in result.stdout
