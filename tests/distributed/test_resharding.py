"""Resuming under a different ZeRO stage and number of ranks: equal to the uninterrupted run, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpgo_video.distributed.manifest import CheckpointError, Layout
from bpgo_video.distributed.resume import resume_mode
from tests.distributed.conftest import run_ranks

BF16_BOUND = 1e-2  # gradients summed in a different order round differently, and Adam divides by them
Results = list[dict[str, Any]]


def results(folder: Path, world_size: int, action: str, saves: Path) -> Results:
    folder.mkdir()
    run_ranks(world_size, [str(folder), action, str(saves)], worker="resume_worker")
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks under each stage."""
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def on_as_many(saves: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two ranks resume from checkpoints of two ranks."""
    return results(tmp_path_factory.mktemp("two") / "read", 2, "write", saves)


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)])
def on_others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One rank resumes from checkpoints of two, and vice versa."""
    before, after = request.param
    folder = tmp_path_factory.mktemp(f"{before}-{after}")
    results(folder / "written", before, "write", folder / "saves")
    return results(folder / "read", after, "read", folder / "saves")


def assert_resumed(found: Results) -> None:
    for result in found:
        assert result["position"] == 17, result
        assert result["loaded"], result
        if result["dtype"] == "float32":
            assert result["error"] < 1e-5, result
        elif result["optimizer"] == "keep":
            assert result["error"] < BF16_BOUND, result
        assert result["left"] == ["latest", "step-000003"], result


HERE = Layout(world_size=4, zero_stage=2, dtype="torch.float32")


@pytest.mark.parametrize(
    ("written", "optimizer", "has_optimizer_state", "mode"),
    [
        (HERE, "keep", True, "as written"),
        (HERE, "keep", False, "as written"),
        (HERE, "fresh", True, "weights"),
        (replace(HERE, world_size=8), "keep", True, "elements"),
        (replace(HERE, zero_stage=1), "keep", True, "elements"),
        (replace(HERE, zero_stage=1), "keep", False, "weights"),
        (replace(HERE, zero_stage=3), "keep", True, "elements"),
        (replace(HERE, zero_stage=3), "fresh", True, "weights"),
        (replace(HERE, zero_stage=3), "keep", False, "weights"),
    ],
)
def test_the_resume_mode_preserves_as_much_state_as_possible(
    written: Layout, optimizer: str, has_optimizer_state: bool, mode: str
) -> None:
    assert resume_mode(written, HERE, optimizer, has_optimizer_state, Path("step-000003")) == mode


def test_another_dtype_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"in torch.bfloat16, this run computes in torch.float32"):
        resume_mode(replace(HERE, dtype="torch.bfloat16"), HERE, "keep", True, Path("step-000003"))


def test_a_run_resumes_under_every_stage_with_its_optimizer(on_as_many: Results) -> None:
    assert_resumed(on_as_many)


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(on_others: Results) -> None:
    assert_resumed(on_others)
