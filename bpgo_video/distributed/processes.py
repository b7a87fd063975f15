"""Is a process of this machine still running? Asked of the kernel's process table, without a signal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One process, told from a later one that is given the same number.

    Attributes:
        machine: the kernel and the namespace in which `pid` has a meaning; empty where the system does not tell.
        pid: its number there.
        started: when it started, in the kernel's own units.
    """

    machine: str
    pid: int
    started: str


def this_process() -> Process:
    pid = os.getpid()
    return Process(_machine(), pid, _started(pid) or "")


def is_running(process: Process) -> bool:
    """Whether a process of this machine runs; one that has ended and waits for its parent does not."""
    return _started(process.pid) == process.started


def _machine() -> str:
    boot, namespace = PROC / "sys/kernel/random/boot_id", PROC / "self/ns/pid"
    if not (boot.is_file() and namespace.is_symlink()):
        return ""
    return f"{boot.read_text('utf-8').strip()} {namespace.readlink()}"


def _started(pid: int) -> str | None:
    try:
        stat = (PROC / str(pid) / "stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()  # what precedes is the program's name, which may hold anything
    return None if state in "ZX" else fields[18]
