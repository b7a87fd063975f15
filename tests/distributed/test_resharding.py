"""A run goes on under another ZeRO stage and on another number of ranks as if it had never stopped, or says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import run_ranks

Results = list[dict[str, Any]]


def results(folder: Path, world_size: int, action: str, saves: Path) -> Results:
    folder.mkdir()
    run_ranks(world_size, [str(folder), action, str(saves)], worker="resume_worker")
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saved under each stage."""
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def on_as_many(saves: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two ranks that go on from their own saves."""
    return results(tmp_path_factory.mktemp("two") / "read", 2, "write", saves)


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)])
def on_others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One rank that goes on from what two saved, and the reverse."""
    before, after = request.param
    folder = tmp_path_factory.mktemp(f"{before}-{after}")
    results(folder / "written", before, "write", folder / "saves")
    return results(folder / "read", after, "read", folder / "saves")


def assert_goes_on(found: Results) -> None:
    for result in found:
        converts = (result["written"] == 3) == (result["stage"] == 3)
        if result["optimizer"] == "keep" and result["name"] == "adamw" and not converts:
            assert "--run.resume-optimizer fresh" in result["refused"], result
            continue
        assert result["position"] == 17, result
        assert result["loaded"], result
        assert result["error"] < 1e-5, result
        assert result["left"] == ["latest", "step-000003"], result


def test_a_run_goes_on_under_any_stage_of_its_kind_and_with_a_fresh_optimiser_under_all(on_as_many: Results) -> None:
    assert_goes_on(on_as_many)
    assert sum("refused" in result for result in on_as_many) == 4


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_ranks(on_others: Results) -> None:
    assert_goes_on(on_others)
