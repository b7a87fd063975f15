"""Requests to stop or save a run: files, SIGTERM, and a second SIGTERM while the main thread is blocked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bpgo_video.distributed.mesh import Mesh
from bpgo_video.training.stopping import Request, StopRequests

ALONE = Mesh(rank=0, world_size=1, device=torch.device("cpu"))
OTHER = Mesh(rank=1, world_size=1, device=torch.device("cpu"))  # a rank that checks no files

DEAF = """
import ctypes
from pathlib import Path
import torch
from bpgo_video.training import stopping
from bpgo_video.distributed.mesh import Mesh
stopping.REPEAT_SECONDS = 1.0
with stopping.StopRequests(Path("unused"), Mesh(0, 1, torch.device("cpu"))):
    print("ready", flush=True)
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)  # for ever, and no signal interrupts it
"""


@pytest.mark.parametrize(("name", "expected"), [("save", Request.SAVE), ("save_quit", Request.STOP)])
def test_a_request_file_applies_until_it_is_handled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, expected: Request
) -> None:
    requests = StopRequests(tmp_path, ALONE)
    assert requests.agreed() is Request.NONE
    (tmp_path / name).touch()
    assert requests.agreed() is expected
    assert StopRequests(tmp_path, OTHER).agreed() is Request.NONE, "only rank 0 reads files"
    requests.fulfilled(expected, "after 3 of 9 steps, in here")
    assert "after 3 of 9 steps, in here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert requests.agreed() is Request.NONE


def test_stopping_takes_precedence_over_saving(tmp_path: Path) -> None:
    (tmp_path / "save").touch()
    (tmp_path / "save_quit").touch()
    assert StopRequests(tmp_path, ALONE).agreed() is Request.STOP


def test_only_handled_request_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "save").touch()
    StopRequests(tmp_path, ALONE).fulfilled(Request.NONE, "at its turn")
    assert (tmp_path / "save").exists()


def test_sigterm_requests_a_stop_and_the_old_handler_is_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests(tmp_path, OTHER) as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # repeated by a launcher
        deadline = time.monotonic() + 10
        while requests.agreed() is Request.NONE and time.monotonic() < deadline:
            time.sleep(0.01)
        assert requests.agreed() is Request.STOP
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_ends_a_rank_blocked_in_native_code(tmp_path: Path) -> None:
    rank = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "ready\n"
    rank.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert rank.poll() is None
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(timeout=10) == 128 + signal.SIGTERM
    rank.stdout.close()
    assert rank.stderr is not None
    with rank.stderr as stderr:
        assert "a second one" in stderr.read()


def test_a_checkpoint_is_due_by_rank_0s_clock_until_one_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    requests = StopRequests(tmp_path, ALONE, minutes=2, clock=lambda: now[0])
    never = StopRequests(tmp_path, ALONE, clock=lambda: now[0])
    other = StopRequests(tmp_path, OTHER, minutes=2, clock=lambda: now[0])
    for seconds, expected in ((119.0, Request.NONE), (120.0, Request.DUE), (121.0, Request.DUE)):
        now[0] = seconds
        assert requests.agreed() is expected
        assert never.agreed() is other.agreed() is Request.NONE
    (tmp_path / "save").touch()
    assert requests.agreed() is Request.SAVE, "a user's request is reported"
    requests.fulfilled(Request.SAVE, "here")
    capsys.readouterr()
    assert requests.agreed() is Request.NONE
    now[0] = 241.0
    requests.fulfilled(requests.agreed(), "here")
    assert requests.agreed() is Request.NONE
    assert capsys.readouterr().out == "", "the clock's request is routine"
