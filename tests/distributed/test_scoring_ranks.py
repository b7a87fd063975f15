"""VBench scoring on several ranks: byte-equal to one rank's file, even after a rank fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bpgo_video.evaluation.vbench_files import read_results
from bpgo_video.evaluation.vbench_scoring import kept_folder
from tests.distributed.conftest import free_port
from tests.made.fake_vbench import fake_package
from tests.made.recipes import ROOT, python_path
from tests.made.scored_clips import DIMENSIONS, clips, score_command

pytestmark = pytest.mark.slow
DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-port")


def launched(launcher: tuple[str, ...], command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", **more}
    ranks = [*launcher, str(free_port())] if launcher else [sys.executable]
    return subprocess.run(
        [*ranks, "tools/evaluate.py", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_several_ranks_give_the_scores_of_one_and_resume_after_a_failure(tmp_path: Path) -> None:
    """Of five videos, rank 1 has the second and fourth; the second, with four frames, exceeds its memory."""
    folder, many, one = clips(tmp_path / "videos"), tmp_path / "many.json", tmp_path / "one.json"
    failed = launched(DEEPSPEED, score_command(folder, many), REFUSED="4")
    assert failed.returncode != 0
    # Rank 1 prints it; rank 0 prints it again, unless the launcher ends it first.
    cause = f"RuntimeError: subject_consistency of {folder / 'a man talks-1.mp4'}: out of memory for 4 frames"
    assert cause in failed.stderr, failed.stderr[-3000:]
    assert [result.dimension for result in read_results(many)] == list(DIMENSIONS[:2])
    done = launched(TORCHRUN, score_command(folder, many))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("temporal_flickering: 5 of 5 videos were measured before") == 1
    assert done.stdout.count(str(many)) == 1 + 3, "only rank 0 prints the stored scores and the result's path"
    assert not kept_folder(many).exists()
    assert launched((), score_command(folder, one)).returncode == 0
    assert many.read_bytes() == one.read_bytes()


def test_an_error_before_the_first_measurement_ends_all_ranks_and_is_printed_once(tmp_path: Path) -> None:
    folder = clips(tmp_path / "videos", count=2)
    (folder / "a man talks-1.mp4").write_bytes(b"no video")
    failed = launched(DEEPSPEED, score_command(folder, tmp_path / "scores.json"))
    assert failed.returncode != 0
    assert failed.stderr.count("error: ") == 1, failed.stderr[-3000:]
    assert "a man talks-1.mp4 is not an mp4, mov, mkv, webm or avi file by its first bytes" in failed.stderr
    assert not (tmp_path / "scores.json").exists()


def test_ranks_share_the_dimensions_of_the_package_and_retry_a_failed_one(tmp_path: Path) -> None:
    """Rank 1 has the second of three dimensions, which fails at first; the package is not aware of ranks."""
    folder, results, interpreter = clips(tmp_path / "videos", count=2), tmp_path / "results", tmp_path / "python"
    fake_package(tmp_path / "site")
    interpreter.write_text(
        f'#!/bin/sh\n[ -z "$RANK$WORLD_SIZE" ] && PYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n'
    )
    interpreter.chmod(0o755)
    names = ["color", "scene", "human_action"]
    command = ["vbench", "--python", str(interpreter), "--videos", str(folder), "--output", str(results)]
    command += ["--device", "cpu", "--dimensions", *names]
    failed = launched(DEEPSPEED, command, BEHAVIOUR='{"scene": "fails"}')
    assert failed.returncode != 0
    assert failed.stderr.count("error: 1 of 3 dimensions were not measured") == 1, failed.stderr[-3000:]
    assert "CUDA out of memory" in failed.stderr
    done = launched(DEEPSPEED, command, BEHAVIOUR="{}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith("2 videos")] == names
    calls = {name: (results / f"{name}.calls").read_text().splitlines() for name in names}
    assert [len(lines) for lines in calls.values()] == [1, 2, 1]
