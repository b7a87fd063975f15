"""pipelines/train_video.py with a rank that fails on entering a phase, starts late, or has flags of its own.

FAILS="RANK HOW PHASE STEP"   HOW of `FAILURES`; STEP is None outside the training loop; PHASE may be `init`
LATE=RANK                     starts three seconds after the others
FLAGS="RANK FLAG VALUE ..."   flags of this rank alone
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import deepspeed
import torch

from bpgo_video.__main__ import main
from bpgo_video.distributed.heartbeat import Heartbeat

RANK = os.environ["RANK"]


def raise_from_another() -> NoReturn:
    try:
        raise KeyError("first cause")
    except KeyError as error:
        raise RuntimeError("made to fail") from error


def fill_disk() -> None:
    """Let larger writes fail from now on: more than any log, less than any checkpoint shard."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def run_out_of_memory() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


FAILURES: dict[str, Callable[[], object]] = {
    "raise": raise_from_another,
    "memory": run_out_of_memory,
    "full-disk": fill_disk,
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate-launcher": lambda: os.kill(os.getppid(), signal.SIGTERM),
}


def fail_if_told(phase: str, step: int | None = None) -> None:
    rank, how, *where = os.environ.get("FAILS", "- - -").split()
    if rank == RANK and where == [phase, str(step)]:
        FAILURES[how]()


def failing_enter(heartbeat: Heartbeat, phase: str, step: int | None = None) -> None:
    enter(heartbeat, phase, step)
    fail_if_told(phase, step)


def failing_init(**options: object) -> None:
    fail_if_told("init")
    init(**options)


if __name__ == "__main__":
    enter, Heartbeat.enter = Heartbeat.enter, failing_enter
    init, deepspeed.init_distributed = deepspeed.init_distributed, failing_init
    owner, *flags = os.environ.get("FLAGS", "-").split()
    if owner == RANK:
        sys.argv += flags
    if os.environ.get("LATE") == RANK:
        time.sleep(3)
    sys.exit(main(["train", *sys.argv[1:]]))
