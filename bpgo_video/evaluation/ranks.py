"""The ranks that an evaluation runs on: those that a launcher started, watched while they work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from bpgo_video.config.run import ParallelConfig
from bpgo_video.distributed import engine
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import TIMEOUT, Mesh
from bpgo_video.inference.generate import ALONE, PATIENCE


@contextmanager
def ranks_at_work(parallel: ParallelConfig, timeout: timedelta = TIMEOUT) -> Iterator[Mesh]:
    """All ranks, or a group of one without a launcher; they are stopped after the block.

    Args:
        timeout: how long a rank waits for the slowest one; one that dies or fails ends the others within seconds.
    """
    mesh = engine.start_ranks(timeout)
    with Heartbeat(mesh, parallel.heartbeat_timeout) as heartbeat:
        heartbeat.enter("evaluation")
        yield mesh
    mesh.barrier()
    engine.stop_ranks()


@contextmanager
def ranks_or_alone() -> Iterator[Mesh]:
    """The same for long work that each rank does for itself; a single process starts no group."""
    if "RANK" not in os.environ:
        engine.refuse_lone_tasks()
        yield ALONE
        return
    with ranks_at_work(ParallelConfig(), PATIENCE) as mesh:
        yield mesh


def device_of(requested: str | None, mesh: Mesh) -> torch.device:
    """The device of this rank. Raises ValueError where one accelerator is named for several ranks."""
    found = mesh.device if requested is None else torch.device(requested)
    if mesh.world_size == 1:
        return found
    if requested is not None and found.index is not None:
        raise ValueError(f"--device {requested} is one device for {mesh.world_size} ranks; without it each has its own")
    return mesh.device if found.type == mesh.device.type else found
