"""pipelines/train_video.py with a full disk on one rank from a phase on; FULL_ENTERING is "RANK PHASE STEP"."""

from __future__ import annotations

import os
import resource
import signal

from bpgo_video.commands.train import main
from bpgo_video.distributed.heartbeat import Heartbeat

LIMIT = 200_000  # bytes per file: more than any log, less than any checkpoint shard
enter = Heartbeat.enter


def enter_with_full_disk(heartbeat: Heartbeat, phase: str, step: int | None = None) -> None:
    enter(heartbeat, phase, step)
    if os.environ.get("FULL_ENTERING") == f"{os.environ['RANK']} {phase} {step}":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


if __name__ == "__main__":
    Heartbeat.enter = enter_with_full_disk
    main()
