"""Gradients of every family under ZeRO 1 and 3, with and without sequence groups, against a single process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.conftest import run_ranks
from tests.families import CASES

BOUND = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_every_gradient_equals_that_of_a_single_process(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    CASES[family].write(folder)
    run_ranks(2, [family, str(folder), str(tmp_path)], worker="family_worker")
    results = [result for path in sorted(tmp_path.glob("rank*.json")) for result in json.loads(path.read_text())]
    assert {(result["stage"], result["sequence"]) for result in results} == {(1, 1), (3, 1), (1, 2), (3, 2)}
    for result in results:
        name = f"ZeRO {result['stage']}, sequence {result['sequence']}"
        assert result["loss"] < BOUND, name
        assert len(result["gradients"]) > 20
        for parameter, error in result["gradients"].items():
            assert error < BOUND, f"{name}: {parameter}"
