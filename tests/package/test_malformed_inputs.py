"""Malformed input ends every command within seconds, with one sentence and exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.made.recipes import ROOT


def torture(call: str) -> None:
    program = f"from tools.torture import inputs, tally; raise SystemExit(tally.show(inputs.{call}))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-1000:]


def test_wrong_inputs_are_explained() -> None:
    """A twelfth of the cases that are written out, of every kind."""
    torture("run_known(12)")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_changed_inputs_are_explained(seed: int) -> None:
    torture(f"run({seed}, 300)")
