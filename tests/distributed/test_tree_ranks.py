"""Training on trees of samples on two ranks under ZeRO-3 with sharded weights: exact ratio, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.conftest import run_ranks
from tests.distributed.sameness import assert_same_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Four steps, two plus two, and a step of a sequence group and of parts of trees that need several forwards."""
    folder = tmp_path_factory.mktemp("trees")
    cases = ["whole=branched:4", "stopped=branched:2", "stopped=branched:4:auto", "sequence=branched:1:never:2:2"]
    run_ranks(2, [str(shards), str(folder), *cases])
    return folder


def test_two_plus_two_steps_on_trees_equal_four(runs: Path) -> None:
    assert_same_run(runs / "whole", runs / "stopped")


@pytest.mark.parametrize("name", ["whole.4", "stopped.4", "sequence.1"])
def test_the_ratio_is_one_before_the_first_update_on_a_tree(runs: Path, name: str) -> None:
    summary = json.loads((runs / f"{name}.json").read_text())
    assert summary["max_ratio_error_first_update"] == 0.0
    assert summary["zero_stage"] == 3
