"""Why a launch failed: printed once on every host, by the rank that knows first.

A launcher ends the other ranks within a second after one exits. So a rank prints before it exits or tells the others.
The ranks of a host agree who prints by a file in the folder for temporary files: they may fail before they have met,
and each host may have a log of its own.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import TracebackType

LINES = 25  # of an error that its message explains
CALLS = 10  # of a traceback, the innermost ones


def exit_code(error: BaseException) -> int:
    """2 if the input is wrong, which the message explains; else 1."""
    return 2 if isinstance(error, (FileNotFoundError, PermissionError)) else int(getattr(error, "exit_code", 1))


def tell(text: str) -> None:
    """Write to stderr, unless a rank of the same launch and host has already told why it fails."""
    if "RANK" in os.environ:
        try:
            with _claims().open("a+") as claims:
                fcntl.flock(claims, fcntl.LOCK_EX)  # held until the text is written: then others may exit
                claimed = os.fstat(claims.fileno())
                if claimed.st_size and claimed.st_mtime > _started():
                    return
                claims.write("x")
                claims.flush()
                _write(text)
            return
        except OSError:  # no folder for temporary files: better twice than never
            pass
    _write(text)


def _claims() -> Path:
    """A file of the ranks with the same parent and port; a claim from before their start is of an earlier launch."""
    launch = (socket.gethostname(), os.getuid(), os.getppid(), os.environ.get("MASTER_PORT", "0"))
    return Path(tempfile.gettempdir(), "-".join(map(str, ("bpgo-video-failed", *launch))))


def _started() -> float:
    """When this process started, in seconds since the epoch."""
    import psutil  # only failing ranks need it

    return psutil.Process().create_time()


def _write(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()


@contextmanager
def told() -> Iterator[None]:
    """Print what the block prints before it exits, but on the ranks of a host only once."""
    if "RANK" not in os.environ:
        yield
        return
    printed = StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            yield
    except SystemExit:
        tell(printed.getvalue())
        raise


def named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def explained(error: BaseException) -> str:
    """The text for an error that the user can fix; ranks that differ from others are named by its notes."""
    lines = ": ".join(["error", *getattr(error, "__notes__", []), str(error)]).splitlines()
    return "\n".join(lines if len(lines) <= LINES else [*lines[:LINES], f"... and {len(lines) - LINES} more lines"])


def traced(error: BaseException, summary: str) -> str:
    """The text for any other error: the innermost calls of its first cause, and the summary."""
    if isinstance(error, KeyboardInterrupt):
        return summary
    cause: BaseException = error
    while earlier := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__):
        cause = earlier
    calls = "".join(traceback.format_tb(cause.__traceback__, limit=-CALLS))
    named = "" if cause is error else "".join(traceback.format_exception_only(cause))
    return f"Traceback (innermost calls last):\n{calls}{named}{summary}"


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of ranks: of equal tracebacks one is enough."""
    who = f"rank {os.environ.get('RANK', '0')} ({socket.gethostname()}, pid {os.getpid()})"
    tell(traced(error, f"error: {who} failed: {named(error)}"))
