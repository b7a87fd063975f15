"""Messages of launches that fail: once on every host, never lost, and short."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from bpgo_video.errors import CALLS, LINES, explained, tell, traced


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of a process that is a rank."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "4")
    return tmp_path


def told(text: str, capsys: pytest.CaptureFixture[str]) -> bool:
    tell(text)
    return capsys.readouterr().err == f"{text}\n"


def test_the_first_rank_of_a_host_tells(claims: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [told("error: first", capsys), told("error: second", capsys)] == [True, False]


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "1"), ("MASTER_PORT", "29999")])
def test_launches_do_not_silence_each_other(
    claims: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """MASTER_PORT distinguishes launches; a process alone always tells."""
    assert told("error: one launch", capsys)
    monkeypatch.setenv(name, value)
    assert told("error: another", capsys)


def test_a_message_of_an_earlier_launch_does_not_silence_this_one(
    claims: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told("error: earlier", capsys)
    (claim,) = claims.iterdir()
    os.utime(claim, (1e9, 1e9))  # before this process started
    assert [told("error: now", capsys), told("error: again", capsys)] == [True, False]


def test_files_of_launches_that_failed_long_ago_are_removed(claims: Path, capsys: pytest.CaptureFixture[str]) -> None:
    owner = f"bpgo-video-failed-{socket.gethostname()}-{os.getuid()}"
    other_user, recent, old = claims / f"{owner}0-1-0", claims / f"{owner}-1-0", claims / f"{owner}-2-0"
    for path, age in ((other_user, 1e6), (recent, 3600), (old, 1e6)):
        path.write_text("x")
        os.utime(path, (time.time() - age,) * 2)
    assert told("error: now", capsys)
    assert [path.exists() for path in (other_user, recent, old)] == [True, True, False]


def test_without_a_folder_for_temporary_files_every_rank_tells(
    claims: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    assert told("error: one", capsys)
    assert told("error: two", capsys)


def deep(calls: int) -> None:
    deeper(calls - 1)


def deeper(calls: int) -> None:  # a second function, since repeated lines are counted instead of printed
    if calls < 0:
        raise KeyError("cause")
    deep(calls)


def test_a_traceback_has_the_innermost_calls_of_the_first_cause() -> None:
    try:
        try:
            deep(100)
        except KeyError as cause:
            raise RuntimeError("consequence") from cause
    except RuntimeError as error:
        text = traced(error, "error: rank 1 failed")
    assert text.count("Traceback") == 1
    assert text.count(", in deep") == CALLS
    assert "in test_" not in text, "outer calls are left out"
    assert text.endswith("KeyError: 'cause'\nerror: rank 1 failed")


def test_an_explained_error_names_its_rank_and_is_short() -> None:
    error = ValueError("the shards are missing")
    error.add_note("rank 1 on node-1")
    assert explained(error) == "error: rank 1 on node-1: the shards are missing"
    lines = explained(ValueError("\n".join("x" * 100))).splitlines()
    assert len(lines) == LINES + 1
    assert lines[-1] == f"... and {100 - LINES} more lines"
