"""Processes: what identifies one on a machine, a launcher that is gone, and an end that no thread can prevent."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from bpgo_video.errors import tell

LAUNCHERS = {  # programs and modules that start ranks, and end them when one dies
    *("deepspeed.launcher.launch", "bpgo_video.distributed.launcher", "bpgo_video.distributed.supervisor"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "slurmstepd"),
}
WORDS = 6  # of a command line, among which is the program or module
WATCH_SECONDS = 2.0
CLOSING_SECONDS = 5.0
_closing: list[Callable[[], object]] = []


def start_time(pid: int) -> str | None:
    """The kernel's start time of a running process; None if it has ended, is a zombie, or there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the program's name before ")" may contain anything
    return None if state in "ZX" else fields[18]


def machine() -> str:
    """The kernel's boot and the namespace of process ids, in which a pid is unique; empty without /proc."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = boot.is_file() and namespace.is_symlink()
    return f"{boot.read_text('utf-8').strip()} {namespace.readlink()}" if known else ""


def call_before_end(close: Callable[[], object]) -> None:
    """Let `end_process` call a function first."""
    _closing.append(close)


def end_process(code: int) -> NoReturn:
    """End this process whatever its threads do: the main thread may be in a collective, which nothing interrupts."""
    try:
        closing = threading.Thread(target=_close, daemon=True)  # storage that hangs must not keep the process
        closing.start()
        closing.join(CLOSING_SECONDS)
    finally:
        os._exit(code)


def _close() -> None:
    for close in _closing:
        with suppress(OSError):  # the process ends anyway
            close()


def watch_launcher() -> None:
    """Let this rank end when its launcher has ended without it. Does nothing for a process without a launcher."""
    launcher = _launcher() if "RANK" in os.environ else None
    if launcher is not None:
        threading.Thread(target=_end_with, args=(launcher,), name="launcher-watch", daemon=True).start()


def _launcher() -> Any:
    """The nearest launcher among the processes above this one, a psutil.Process; None if there is none."""
    import psutil  # only ranks need it

    for process in psutil.Process().parents():
        with suppress(psutil.Error):  # it has just ended, or belongs to another user
            if LAUNCHERS & {Path(word).name for word in [process.name(), *process.cmdline()[:WORDS]]}:
                return process
    return None


def _is_running(process: Any) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end_with(launcher: Any) -> None:
    while _is_running(launcher):
        time.sleep(WATCH_SECONDS)
    try:
        tell(
            f"error: the launcher of these ranks ({socket.gethostname()}, pid {launcher.pid}) has ended without them, "
            "so they end too; complete files and checkpoints are intact. Repeat the command, a training with "
            "--run.resume auto"
        )
    finally:
        end_process(1)
