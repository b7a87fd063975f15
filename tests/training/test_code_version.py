"""The code version recorded by a run: its commit, if the files are under git."""

from __future__ import annotations

import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest

from bpgo_video.distributed import resume
from bpgo_video.inference.hub import commit, this_code
from bpgo_video.training.loop import load
from bpgo_video.training.session import PolicySession


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_has_its_commit_and_marks_modified_files(tmp_path: Path) -> None:
    code = tmp_path / "repo" / "package" / "code.py"
    code.parent.mkdir(parents=True)
    code.write_text("one")
    git(tmp_path / "repo", "init", "-q")
    assert commit(code) is None, "the file is not tracked by git"
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "-qm", "first")
    git(tmp_path / "repo", "tag", "v1")
    head = git(tmp_path / "repo", "rev-parse", "HEAD")
    assert commit(code) == head
    installed = tmp_path / "repo" / "environment" / "code.py"
    installed.parent.mkdir()
    installed.write_text("somebody else's")
    assert commit(installed) is None
    assert commit(code) == head, "an untracked file does not change the code"
    code.write_text("two")
    assert commit(code) == f"{head}-dirty"


def test_a_folder_without_git_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("")
    assert commit(tmp_path / "code.py") is None
    assert this_code().startswith("bpgo_video ")


@pytest.mark.parametrize(
    ("earlier", "now"), [({}, ["b"]), ({"code": ["a"]}, ["a", "b"]), ({"code": ["a", "b"]}, ["a", "b"])]
)
def test_a_resumed_run_records_the_code_of_all_its_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, earlier: dict[str, list[str]], now: list[str]
) -> None:
    monkeypatch.setattr(resume, "load", lambda *_: {"progress": {"step": 2}, **earlier})
    session = Mock(spec=PolicySession, code=["b"], averages=[], engine=None, mesh=None, config=Mock())
    assert load(session, tmp_path / "step-000002") == {"step": 2}
    assert session.code == now
