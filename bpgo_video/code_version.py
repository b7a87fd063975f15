"""Which code is this? The package's version and, of a checkout, the git commit."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def this_code() -> str:
    """Such as `bpgo_video 0.1.0, commit 6f1c...`, with `-dirty` behind a commit that files differ from.

    Asked for when a run starts, it is what the run computes with, whatever becomes of the checkout meanwhile.
    """
    found = commit(Path(__file__))
    return f"bpgo_video {version('bpgo-video')}" + (f", commit {found}" if found else "")


def commit(file: Path) -> str | None:
    """The commit that a file's checkout is at; None where git does not know the file, or is not there."""
    git = ["git", "-C", str(file.parent)]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        _ask([*git, "ls-files", "--error-unmatch", file.name])  # an environment may lie in somebody else's checkout
        return _ask([*git, *describe])
    except (OSError, subprocess.CalledProcessError):  # PATH may also name folders that this user must not read
        return None


def _ask(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
