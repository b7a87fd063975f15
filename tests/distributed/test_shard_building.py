"""Building of prompt shards on several ranks, under both launchers, and after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bpgo_video.data.reader import PromptShards
from tools.tiny import prompts

ROOT = Path(__file__).parents[2]
TOOL = [str(ROOT / "tools" / "make_prompt_shards.py"), "build", "--input", str(prompts.PATH)]
SETTINGS = ["--policy", "package:bpgo_video.tiny/weights/wan", "--max-sequence-length", "16", "--shard-size", "10"]
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"],
    "deepspeed": [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", "29618"],
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(launcher: list[str], output: Path, *flags: str) -> subprocess.Popen:
    command = [*launcher, *TOOL, *SETTINGS, "--output", str(output), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert start([sys.executable], folder).wait(120) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_ranks_write_the_shards_of_one(whole: Path, tmp_path: Path, launcher: list[str]) -> None:
    assert start(launcher, tmp_path / "out").wait(180) == 0
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.slow
def test_a_killed_build_resumes(whole: Path, tmp_path: Path) -> None:
    """One prompt per batch slows the build down; it is killed once the first shard exists."""
    output = tmp_path / "out"
    process = start([sys.executable], output, "--batch-size", "1")
    while not list(output.glob("prompts-*.tar")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("prompts-*.tar")}
    assert 0 < len(kept) < 10
    assert start([sys.executable], output, "--batch-size", "1").wait(120) == 0
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("prompts-*.tar")}
    assert {name: after[name] for name in list(kept)[:-1]} == dict(list(kept.items())[:-1])
    assert len(PromptShards(output)) == len(PromptShards(whole))
    PromptShards(output).verify()
