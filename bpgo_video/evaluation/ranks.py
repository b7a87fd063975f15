"""Ranks of an evaluation: those of a launcher, with a heartbeat while they work, or this process alone."""

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
def evaluation_ranks(parallel: ParallelConfig, timeout: timedelta = TIMEOUT) -> Iterator[Mesh]:
    """All ranks of the launcher, or a process group of one; the group is stopped after the block.

    Args:
        timeout: how long a rank waits for the slowest one; a rank that dies or fails ends the others within seconds.
    """
    mesh = engine.start_ranks(timeout)
    with Heartbeat(mesh, parallel.heartbeat_timeout, expected=(ValueError, OSError)) as heartbeat:
        heartbeat.enter("evaluation")
        yield mesh
    engine.stop_ranks()


@contextmanager
def independent_ranks() -> Iterator[Mesh]:
    """Ranks for long work without communication; a single process starts no process group."""
    if "RANK" not in os.environ:
        engine.refuse_lone_tasks()
        yield ALONE
        return
    with evaluation_ranks(ParallelConfig(), PATIENCE) as mesh:
        yield mesh


def device_of(requested: str | None, mesh: Mesh) -> torch.device:
    """The device of this rank. Raises ValueError if one accelerator is requested for several ranks."""
    device = mesh.device if requested is None else torch.device(requested)
    if mesh.world_size == 1:
        return device
    if requested is not None and device.index is not None:
        raise ValueError(
            f"--device {requested} is one device for {mesh.world_size} ranks; omit it to give each rank its own"
        )
    return mesh.device if device.type == mesh.device.type else device
