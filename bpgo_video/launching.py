"""Start local ranks with DeepSpeed's launcher, on a free port."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn


def free_port() -> int:
    """A free TCP port of this machine; the launcher's default port is the same for all jobs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def become_launcher(module: str, ranks: int, arguments: Sequence[str]) -> NoReturn:
    """Replace this process with DeepSpeed's launcher, which runs a module on `ranks` local ranks.

    The exit code is the launcher's. If OMP_NUM_THREADS is not set, the ranks share the machine's cores.

    Raises:
        ValueError: this process already is a rank.
    """
    if "RANK" in os.environ:
        raise ValueError(
            f"--ranks {ranks} starts a launcher, but this process already is rank {os.environ['RANK']} of one; "
            "leave out --ranks"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    launcher = ["-m", "deepspeed.launcher.runner", "--quiet", "--hostfile=", f"--num_accelerators={ranks}"]
    command = [sys.executable, *launcher, f"--master_port={free_port()}", "--module", module, *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)
