"""`make gpu` without a GPU: all stages on small shapes, its time budget, and records of failures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from time import time
from typing import Any

import pytest
import torch

from tests.made.recipes import ROOT
from tools.gpu.__main__ import STAGES, main
from tools.gpu.bench import published
from tools.gpu.checks import CHECKS
from tools.gpu.speed import TIMED_BACKENDS, forward_operations
from tools.gpu.stages import Note, Record, Stage, run_stages

FACTS = {"date": "2026-01-02", "command": "c", "code": "v", "packages": {}}
PARTS = ("forward", "denoise", "replay", "update")
CPU_LACKS = ("_native_cudnn", "_native_efficient", "flash", "_flash_3")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a dry run, in a separate process because it starts ranks."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "tools.gpu", "--dry-run", "--minutes", "60", "--output", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def stages(output: Path) -> dict[str, Any]:
    return json.loads((output / "gpu.json").read_text())["stages"]


def test_every_stage_runs_and_records_its_seconds(stages: dict[str, Any]) -> None:
    assert list(stages) == list(STAGES)
    assert all(found["seconds"] > 0 and "failure" not in found for found in stages.values())


def test_every_check_holds_or_gives_a_reason_why_it_cannot_run(stages: dict[str, Any]) -> None:
    found = {name: stages["checks"][name] for name in CHECKS}
    assert {name for name, figures in found.items() if "cannot" in figures} == {
        f"ratio {backend} bf16" for backend in CPU_LACKS
    }
    assert all(figures["holds"] for figures in found.values() if "cannot" not in figures)
    assert 0 < max(found["velocity"]["relative_error"]) < 0.02
    native = found["ratio native bf16"]
    assert native["log_prob_drift_max"] == 0
    assert list(native["by_step"]) == list(native["by_step_in_half_the_batch"]) == ["0", "1"]
    assert set(native["doctor"]) == {"velocity", "ODE", "rewards", "agreement", "ratio", "gradient", "cost"}


def test_every_part_of_a_step_is_timed_and_its_memory_compared_with_the_plan(stages: dict[str, Any]) -> None:
    sizes = [name for name in stages["small_model"] if name.startswith("tiny")]
    assert sizes == ["tiny, 2 blocks, 64x64x5", "tiny, 2 blocks, 64x64x9"]
    for size in sizes:
        found, planned = stages["small_model"][size], stages["memory_plan"][size]
        assert all(found[f"{part}_seconds"] > 0 and found[f"{part}_peak_bytes"] > 0 for part in (*PARTS, "decode"))
        rollout = 16 * found["denoise_seconds"] + found["decode_seconds"]
        assert found["video_rollout_seconds"] == pytest.approx(rollout)
        assert found["log_prob_drift"] == 0
        assert set(planned) >= {"denoise", "replay", "update"}
        assert all(row["planned_over_measured"] == row["planned"] / row["measured"] for row in planned.values())


def test_the_large_model_is_extrapolated_from_two_numbers_of_blocks(stages: dict[str, Any]) -> None:
    found = stages["large_model"]
    one, two = (found[f"tiny, {blocks} blocks, 64x64x9"]["replay_seconds"] for blocks in (1, 2))
    assert found["replay_seconds, 2 blocks"] == pytest.approx({"each": two - one, "all": two})


def test_kernels_are_compared_or_have_a_reason_why_they_cannot_run(stages: dict[str, Any]) -> None:
    for found in (stages["attention"]["5 frames"], stages["attention"]["9 frames"]):
        assert {name for name in TIMED_BACKENDS if "cannot" in found[name]} == set(CPU_LACKS)
        assert found["native"]["forward_over_default"] == found["native"]["replay_over_default"] == 1
        assert found["_native_flash"]["finite_gradients"]
    assert stages["compiled"]["compiled blocks"]["replay_over_default"] > 0


def test_the_tables_have_a_row_for_every_stage_check_and_backend(output: Path) -> None:
    text = (output / "gpu.md").read_text()
    assert all(f"| {name} |" in text for name in (*STAGES, *CHECKS, *TIMED_BACKENDS))


def test_the_operation_count_is_that_of_the_published_shape() -> None:
    model, tokens, text, dim, ffn = published().small, 9 * 30 * 52, 512, 1536, 8960
    self_attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    cross_attention = 2 * tokens * dim * dim + 2 * text * dim * dim + 2 * tokens * text * dim
    blocks = 30 * (self_attention + cross_attention + 2 * tokens * dim * ffn)
    patches = 2 * tokens * dim * 4 * 16  # in and out, 2x2 patches of 16 channels
    embeddings = text * (4096 * dim + dim * dim) + 256 * dim + dim * dim + dim * 6 * dim
    assert forward_operations(model, published().videos[0], text) == 2 * (blocks + patches + embeddings)


def works(place: None, note: Note) -> None:
    note("figure", 1.5)


def raises(place: None, note: Note) -> None:
    note("before", {"value": float("nan")})
    raise ValueError("what happened")


def never_ends(place: None, note: Note) -> None:
    while True:
        note("rounds", 1)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text())["stages"]


def test_a_stage_that_raises_is_recorded_and_the_others_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(tmp_path, time(), FACTS)
    assert not run_stages({"bad": Stage(raises, 1), "good": Stage(works, 1)}, None, record, minutes=1)
    found = read(tmp_path)
    assert found["bad"]["before"] == {"value": "nan"}
    assert "ValueError: what happened" in found["bad"]["failure"]["error"]
    assert "ValueError: what happened" in capsys.readouterr().out
    assert found["good"]["figure"] == 1.5


def test_a_stage_that_takes_much_longer_than_its_estimate_is_stopped(tmp_path: Path) -> None:
    record = Record(tmp_path, time(), FACTS)
    assert not run_stages({"endless": Stage(never_ends, 0.2), "good": Stage(works, 1)}, None, record, minutes=1)
    assert "OutOfTime: stopped after 0 s" in read(tmp_path)["endless"]["failure"]["error"]
    assert read(tmp_path)["good"]["figure"] == 1.5


def test_a_check_that_does_not_hold_fails_the_run(tmp_path: Path) -> None:
    record = Record(tmp_path, time(), FACTS)
    assert not run_stages({"check": Stage(lambda place, note: note("a", {"holds": False}), 1)}, None, record, 1)


def test_stages_beyond_the_budget_are_skipped_and_the_others_kept(tmp_path: Path) -> None:
    record = Record(tmp_path, time(), FACTS)
    assert run_stages({"first": Stage(works, 1), "second": Stage(works, 30)}, None, record, minutes=0.1)
    found = read(tmp_path)
    assert found["first"]["figure"] == 1.5
    assert "it takes about 30 s" in found["second"]["skipped"]
    assert "figure" not in found["second"]
    assert "| second |" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_the_command_names_the_dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "--dry-run" in capsys.readouterr().err
