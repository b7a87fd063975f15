"""The launcher of one machine, again after each unexpected failure, for `--ranks N` with run.max_restarts above 0.

    python -m bpgo_video.distributed.supervisor RESTARTS RUN_DIR N FLAGS

A failure is unexpected if the input is right and no user asked for the end. A newer checkpoint sets the count of
restarts back to 0, so that a run with rare failures goes on, and one that always fails at the same step ends.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bpgo_video.cli import free_port
from bpgo_video.distributed import launcher
from bpgo_video.distributed.checkpoint import FOLDER, LATEST

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0  # seconds; doubled after each failure without progress
WRONG_INPUT = 2
STOPS = (signal.SIGINT, signal.SIGTERM)
BY_USERS = {code for number in STOPS for code in (-number, 128 + number)}  # exit codes of a rank that a signal ended


def supervise(
    launch: Callable[[bool], tuple[int, bool]],
    progress: Callable[[], str | None],
    restarts: int,
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Launch until the ranks end well, or fail more than `restarts` times in a row without progress; the exit code.

    Args:
        launch: runs the ranks, to begin or again; returns their exit code, and whether a user stopped them.
        progress: the name of the newest checkpoint, which changes with progress.
    """
    failures, before, again = 0, progress(), False
    while True:
        code, stopped = launch(again)
        if stopped or code in {0, WRONG_INPUT, *BY_USERS}:
            return code
        reached = progress()
        failures = failures + 1 if reached == before else 1
        where = f"from {reached}" if reached else "from the beginning"
        if failures > restarts:
            print(f"error: not started again: {restarts} restarts {where} made no progress", file=sys.stderr)
            return code
        pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
        print(
            f"the ranks ended with exit code {code}; they start again in {pause:.0f} s {where} (restart {failures} of "
            f"{restarts} without progress)",
            file=sys.stderr,
            flush=True,
        )
        sleep(pause)
        before, again = reached, True


def launched(words: Sequence[str]) -> tuple[int, bool]:
    """Run the launcher in this process; its exit code, and whether this process received a signal to stop."""
    reading, writing = socket.socketpair()  # Python writes the numbers of received signals, whoever handles them
    with reading, writing:
        reading.setblocking(False)
        writing.setblocking(False)
        earlier = signal.set_wakeup_fd(writing.fileno())
        code = 0
        try:
            launcher.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        except KeyboardInterrupt:  # before the launcher handles it
            code = 128 + signal.SIGINT
        finally:
            signal.set_wakeup_fd(earlier)
            for number in STOPS:  # the launcher's handlers end processes that no longer exist
                signal.signal(number, signal.SIG_DFL)
        try:
            return code, bool(reading.recv(1))
        except BlockingIOError:
            return code, False


def main() -> int:
    restarts, run_dir, *words = sys.argv[1:]
    latest = Path(run_dir) / FOLDER / LATEST

    def launch(again: bool) -> tuple[int, bool]:
        port = f"--master_port={free_port()}"  # the port of the launch before may still be taken
        own = [port if word.startswith("--master_port=") else word for word in words]
        return launched([*own, *(["--run.resume", "auto"] if again else [])])

    def progress() -> str | None:
        return latest.read_text("utf-8", "replace").strip() if latest.is_file() else None

    return supervise(launch, progress, int(restarts))


if __name__ == "__main__":
    sys.exit(main())
