"""Restarts: after which ends, how often, after which pauses; and a real run that loses a rank and finishes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bpgo_video.config.reading import to_yaml
from bpgo_video.distributed import launcher, supervisor
from bpgo_video.distributed.supervisor import launched, supervise
from bpgo_video.training.metrics import read_metrics
from tests.made.recipes import ROOT, python_path, small_recipe, without_evaluation


def ends(codes: list[int], reached: list[str | None], restarts: int) -> tuple[int, list[float], list[bool]]:
    """The exit code, pauses and launches of a run whose launches end with `codes` and reach these checkpoints."""
    pauses: list[float] = []
    launches: list[bool] = []

    def launch(again: bool) -> tuple[int, bool]:
        launches.append(again)
        return codes[len(launches) - 1], False

    code = supervise(launch, lambda: reached[len(launches)], restarts, pauses.append)
    assert len(launches) == len(codes)
    return code, pauses, launches


@pytest.mark.parametrize("code", [0, 2, 130, 143, -15])
def test_success_wrong_input_and_stops_start_nothing_again(code: int) -> None:
    assert ends([code], [None, "step-1"], restarts=3) == (code, [], [False])


def test_failures_without_progress_pause_longer_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    code, pauses, launches = ends([1, -9, 1], [None] * 4, restarts=2)
    assert (code, pauses, launches) == (1, [5.0, 10.0], [False, True, True])
    lines = capsys.readouterr().err.splitlines()
    assert "exit code 1; they start again in 5 s from the beginning (restart 1 of 2 without progress)" in lines[0]
    assert lines[-1] == "error: not started again: 2 restarts from the beginning made no progress"


def test_a_newer_checkpoint_sets_the_count_of_restarts_back() -> None:
    reached = [None, "a", "b", "b", "c", "c"]
    assert ends([1, 1, 1, 1, 0], reached, restarts=2) == (0, [5.0, 5.0, 10.0, 5.0], [False, *[True] * 4])


def test_pauses_are_bounded() -> None:
    assert max(ends([1] * 10, [None] * 11, restarts=9)[1]) == supervisor.LONGEST_PAUSE


@pytest.mark.parametrize("sent", [None, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_is_a_users_stop(monkeypatch: pytest.MonkeyPatch, sent: signal.Signals | None) -> None:
    before = {number: signal.getsignal(number) for number in supervisor.STOPS}

    def launch(words: list[str]) -> None:
        for number in supervisor.STOPS:
            signal.signal(number, lambda *_: sys.exit(1))
        if sent is not None:
            os.kill(os.getpid(), sent)
        sys.exit(1)

    monkeypatch.setattr(launcher, "main", launch)
    try:
        assert launched([]) == (1, sent is not None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


LOOP = ["bash", str(ROOT / "docs" / "examples" / "relaunch.sh"), "run"]


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "restarts"), [([], 1), (LOOP, 0)], ids=["supervisor", "shell loop"])
def test_a_run_whose_rank_was_killed_is_started_again_and_finishes(
    tmp_path: Path, shards: Path, loop: list[str], restarts: int
) -> None:
    run = {"num_steps": 3, "save_every": 1, "save_minutes": 0.0, "max_restarts": restarts}
    config = small_recipe(tmp_path / "run", shards, run=run)
    (tmp_path / "recipe.yaml").write_text(to_yaml(without_evaluation(config)))
    marker = tmp_path / "killed"
    (tmp_path / "sitecustomize.py").write_text(KILLER.format(marker=str(marker)))
    command = [sys.executable, "-m", "bpgo_video", "train", str(tmp_path / "recipe.yaml"), "--ranks", "2"]
    resume = ["--run.resume", "auto"] if loop else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(tmp_path)}
    result = subprocess.run(
        [*loop, *command, *resume], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert marker.exists()
    assert result.stderr.count("again in 5 s from step-00000") == 1, result.stderr
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


KILLER = """
import os, signal, threading, time
from pathlib import Path
def kill():
    marker = Path({marker!r})
    while not (marker.parent / "run" / "checkpoints" / "latest").exists():
        time.sleep(0.02)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("RANK") == "1":
    threading.Thread(target=kill, daemon=True).start()
"""
