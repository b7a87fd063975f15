"""Ranks whose launcher is gone end, and processes without a launcher survive the shell that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.made.recipes import ROOT

RANK = """
import os, sys, time
from pathlib import Path
from bpgo_video import processes
processes.WATCH_SECONDS = 0.1
processes.call_before_end(lambda: Path(sys.argv[1] + ".closed").touch())
processes.watch_launcher()
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(20)
"""
STARTS_RANKS = """
import os, subprocess, sys
for rank in "01":
    command = [sys.executable, "-c", sys.argv[2], sys.argv[1] + rank]
    environment = dict(os.environ, RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_PORT=str(os.getpid()))
    rank = subprocess.Popen([*sys.argv[3:], *command], env=environment)
rank.wait()
"""
WRAPPER = ["bash", "-c", '"$@"; exit $?', "wrapper"]


def orphaned(name: str, folder: Path, *wrapper: str) -> tuple[list[psutil.Process], Path]:
    """Two ranks whose parent, a program of this name, was killed; and what they print."""
    (folder / name).write_text(STARTS_RANKS)
    log = folder / "log"
    with log.open("wb") as file:
        parent = subprocess.Popen(
            [sys.executable, str(folder / name), str(folder / "rank"), RANK, *wrapper],
            cwd=ROOT, stderr=file, start_new_session=True,
        )  # fmt: skip
    files = [folder / f"rank{rank}" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(path.is_file() and path.read_text() for path in files):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    ranks = [psutil.Process(int(path.read_text())) for path in files]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    return ranks, log


@pytest.mark.parametrize("wrapper", [[], WRAPPER], ids=["started directly", "started by a script"])
def test_ranks_end_when_their_launcher_is_killed_and_one_of_them_says_so(tmp_path: Path, wrapper: list[str]) -> None:
    ranks, log = orphaned("torchrun", tmp_path, *wrapper)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    assert "has ended without them" in log.read_text()
    assert wrapper or log.read_text().count("error: the launcher of these ranks") == 1
    assert (tmp_path / "rank0.closed").exists(), "leases are released"


def test_processes_without_a_launcher_survive_their_parent(tmp_path: Path) -> None:
    ranks, log = orphaned("train.py", tmp_path)
    time.sleep(1)
    assert all(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert log.read_text() == ""
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
