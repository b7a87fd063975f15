"""Generation on two ranks: disjoint videos, one manifest, and resumption after a killed rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bpgo_video.data.media import read_video
from tests.distributed.conftest import free_port
from tests.made.random_wan import random_wan
from tests.made.recipes import ROOT, python_path

pytestmark = pytest.mark.slow
LAUNCHER = Path(sys.executable).with_name("deepspeed")


def command(output: Path, policy: Path, prompts: Path, *launcher: str) -> list[str]:
    return [
        *launcher, "pipelines/generate_video.py", "--policy", str(policy), "--prompts", str(prompts), "--output",
        str(output), "--seed", "3", "--num-steps", "3", "--guidance-scale", "1", "--num-frames", "9", "--height", "64",
        "--width", "64", "--samples-per-prompt", "2",
    ]  # fmt: skip


def on_two_ranks(output: Path, policy: Path, prompts: Path) -> subprocess.Popen[str]:
    launcher = (str(LAUNCHER), "--num_accelerators", "2", "--master_port", str(free_port()))
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(output, policy, prompts, *launcher), cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def manifest(output: Path) -> dict:
    return json.loads((output / "generation.json").read_text())


def test_two_ranks_generate_the_videos_of_one_and_resume_after_a_kill(tmp_path: Path) -> None:
    policy, prompts = random_wan(tmp_path / "wan"), tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a red circle moving left {number}\n" for number in range(20)))
    first = on_two_ranks(tmp_path / "two", policy, prompts)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "two").glob("*.mp4"))) < 4:
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[0][-3000:]
        time.sleep(0.05)
    kill_one_rank(first.pid)
    first.communicate(timeout=120)
    assert first.returncode != 0
    assert not manifest(tmp_path / "two")["complete"]
    early = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("*.mp4")}
    assert 4 <= len(early) < 40
    second = on_two_ranks(tmp_path / "two", policy, prompts)
    output = second.communicate(timeout=300)[0]
    assert second.returncode == 0, output[-3000:]
    assert manifest(tmp_path / "two")["complete"]
    kept = {name: (tmp_path / "two" / name).stat().st_mtime_ns for name in early}
    assert kept == early
    subprocess.run(
        command(tmp_path / "one", policy, prompts, sys.executable), cwd=ROOT, check=True,
        env={**os.environ, "PYTHONPATH": python_path()},
    )  # fmt: skip
    assert manifest(tmp_path / "one") == manifest(tmp_path / "two")
    for path in (tmp_path / "one").glob("*.mp4"):
        alone, together = (read_video(folder / path.name)[0] for folder in (tmp_path / "one", tmp_path / "two"))
        assert (
            alone - together
        ).abs().mean() < 0.015  # one pixel may round differently; different videos are .036 apart


def test_two_ranks_generate_a_complete_layout(tmp_path: Path) -> None:
    """The folder has only VBench's file names; partial files of a killed rank are removed."""
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "videos"
    prompts.write_text("".join(f"a red circle moving left {number}\n" for number in range(3)))
    folder.mkdir()
    (folder / ".a red circle moving left 0-0.mp4.partial-01234567").write_bytes(b"of a killed rank")
    made = [
        "--policy", str(random_wan(tmp_path / "wan")), "--seed", "3", "--num-steps", "2", "--guidance-scale", "1",
        "--num-frames", "9", "--height", "64", "--width", "64",
    ]  # fmt: skip
    suite = ["tools/evaluate.py", "layout", "--suite", str(prompts), "--output", str(folder), "--samples", "2"]
    launcher = [str(LAUNCHER), "--num_accelerators", "2", "--master_port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, *suite, *made], cwd=ROOT, env=environment, check=True)
    names = {f"a red circle moving left {number}-{sample}.mp4" for number in range(3) for sample in range(2)}
    assert {path.name for path in folder.iterdir()} == names
    content = json.loads((tmp_path / "videos.generation.json").read_text())
    assert content["complete"]
    assert {video["file"] for video in content["videos"]} == names
    subprocess.run([sys.executable, *suite, "--check"], cwd=ROOT, env=environment, check=True)


def kill_one_rank(launcher: int) -> None:
    """Send SIGKILL to rank 1, found among the launcher's descendants."""
    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("RANK") == "1":
            process.kill()
            return
    raise AssertionError("there is no rank 1")


def test_an_error_on_any_rank_sets_the_exit_code(tmp_path: Path) -> None:
    process = on_two_ranks(tmp_path / "out", tmp_path / "none", tmp_path / "none.txt")
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert f"model folder '{tmp_path / 'none'}' does not exist" in output
    assert not (tmp_path / "out").exists()
