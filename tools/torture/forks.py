"""What does a command do with malformed input? Each case runs in a fork of a process that has imported everything."""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

LIMIT = 5.0  # seconds of the processor, which do not depend on what else the machine does
HANG = 60.0  # seconds
MEMORY = 4 * 2**30  # bytes that a case may take besides what is imported
LONGEST = 3000  # characters of a message


@dataclass(frozen=True)
class Case:
    """A command line and the files in its folder.

    Attributes:
        files: content by path; a function makes what is no plain file.
        must_fail: the input is wrong, so exit code 0 would be a mistake.
        codes: exit codes besides 2 that a right input may have.
    """

    name: str
    argv: tuple[str, ...]
    files: Mapping[str, bytes | Callable[[Path], None]] = field(default_factory=dict)
    must_fail: bool = False
    codes: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Outcome:
    """What a case did: held (right after all), detected, or a mistake (`tally.py`)."""

    case: Case
    verdict: str
    code: int
    seconds: float
    text: str


def run_case(case: Case, base: Path, command: Callable[[tuple[str, ...]], int]) -> Outcome:
    """Run a case in a fork, in a folder of its own with links to all of `base`."""
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder, output = Path(name, "work"), Path(name, "output")
        folder.mkdir()
        write_files(case, base, folder)
        started = time.monotonic()
        if not (child := os.fork()):
            _become(case, folder, output, command)
        ended = _ends(child)
        seconds = time.monotonic() - started
        _end_group(child)
        _, status, used = os.wait4(child, 0)
        code, ended = os.waitstatus_to_exitcode(status), ended and used.ru_utime + used.ru_stime <= LIMIT
        text = output.read_bytes()[-20_000:].decode("utf-8", "replace") if output.exists() else ""
    return Outcome(case, verdict_of(case, code, text) if ended else "slow", code, seconds, text)


def write_files(case: Case, base: Path, folder: Path) -> None:
    for path in sorted(base.rglob("*")):
        target = folder / path.relative_to(base)
        if path.is_dir():
            target.mkdir()
        elif str(path.relative_to(base)) not in case.files:
            target.symlink_to(path)
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)


def verdict_of(case: Case, code: int, text: str) -> str:
    if "Traceback" in text or code not in (0, 1, 2):
        return "traceback"
    if code == 2:
        message = text[text.find("error: ") :]
        return "detected" if "error: " in text and len(message) <= LONGEST else "unclear"
    if code not in case.codes:
        return "unclear"
    return "silent" if case.must_fail else "held"


def _ends(child: int) -> bool:
    """Whether a child ends in time."""
    descriptor = os.pidfd_open(child)
    try:
        return bool(select.select([descriptor], [], [], HANG)[0])
    finally:
        os.close(descriptor)


def _end_group(child: int) -> None:
    """End a child and all that it has started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)  # before it had a group


def _become(case: Case, folder: Path, output: Path, command: Callable[[tuple[str, ...]], int]) -> None:
    """Run the case in this process, which is the fork, and end it."""
    os.setsid()
    os.chdir(folder)
    target = os.open(output, os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    used = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.argv = ["bpgo-video", *case.argv]
    try:
        code = command(case.argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:  # what the interpreter would print
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
