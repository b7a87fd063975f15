"""pipelines/train_video.py with one rank that kills itself on entering a phase; DIES_ENTERING is "RANK PHASE STEP"."""

from __future__ import annotations

import os
import signal

from bpgo_video.commands.train import main
from bpgo_video.distributed.heartbeat import Heartbeat

enter = Heartbeat.enter


def enter_or_die(heartbeat: Heartbeat, phase: str, step: int | None = None) -> None:
    enter(heartbeat, phase, step)
    if os.environ.get("DIES_ENTERING") == f"{os.environ['RANK']} {phase} {step}":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Heartbeat.enter = enter_or_die
    main()
