"""Version of the running code: the package's version and, in a checkout, the git commit."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def this_code() -> str:
    """`bpgo_video 0.1.0, commit 6f1c...`, or `6f1c...-dirty` if files differ from the commit.

    Call it when a run starts: the result is cached, and later changes of the checkout do not affect the run.
    """
    found = commit(Path(__file__))
    return f"bpgo_video {version('bpgo-video')}" + (f", commit {found}" if found else "")


def commit(file: Path) -> str | None:
    """The commit of the checkout that tracks a file; None if git does not track it or is not installed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # an environment may be inside a checkout of something else
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):  # OSError also if PATH names folders that this user may not read
        return None
