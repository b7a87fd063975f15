"""Malformed input ends every command within seconds, with one sentence and exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.made.recipes import ROOT


def torture(*flags: str) -> None:
    command = [sys.executable, "-m", "tools.torture.inputs", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-1000:]


def test_wrong_inputs_are_explained() -> None:
    """A twelfth of the cases that are written out, of every kind."""
    torture("--known", "12")


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1"])
def test_changed_inputs_are_explained(seed: str) -> None:
    torture("--seed", seed, "--count", "300")
