"""Memory and cores available to a rank, within the container's cgroup limits (version 1 or 2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bpgo_video.distributed.mesh import Mesh

SHARE_FOR_WEIGHTS = 0.5  # of the free memory; activations, attention and VAE decoding need the rest
CGROUP = Path("/sys/fs/cgroup")
MEMORY_FILES = (  # limit, usage, statistics, and the statistics' name for page cache that the kernel can reclaim
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_memory() -> int:
    """Bytes available on this machine, at most what its cgroup limit leaves."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file, statistics_file, cache in MEMORY_FILES:
        limit = _cgroup_number(limit_file)
        if limit is not None:
            statistics = dict(line.split() for line in (CGROUP / statistics_file).read_text("utf-8").splitlines())
            available = min(available, limit - (_cgroup_number(usage_file) or 0) + int(statistics.get(cache, 0)))
    return max(available, 0)


def available_cores() -> int:
    """CPU cores of this process, at most its cgroup's CPU quota."""
    quota, period = _cgroup_number("cpu/cpu.cfs_quota_us"), _cgroup_number("cpu/cpu.cfs_period_us")
    if (file := CGROUP / "cpu.max").is_file():
        quota, period = (int(word) if word.isdigit() else None for word in file.read_text("utf-8").split())
    cores = len(os.sched_getaffinity(0))
    return min(cores, max(1, quota // period)) if quota and period and quota > 0 else cores


def _cgroup_number(name: str) -> int | None:
    """The number in a cgroup file; None if there is no such file or no limit ("max")."""
    file = CGROUP / name
    text = file.read_text("utf-8").strip() if file.is_file() else ""
    return int(text) if text.lstrip("-").isdigit() else None


def free_bytes(device: torch.device) -> int:
    """Bytes that a rank can still allocate: on a GPU including the allocator's unused reserve, on a CPU its share."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_memory() // ranks_of_this_host()


def ranks_of_this_host() -> int:
    """Ranks on this host according to DeepSpeed's launcher or torchrun; 1 without a launcher."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")


@dataclass
class Growth:
    """Bytes of device memory that a block's peak was above its start; 0 where it cannot be measured."""

    bytes: int = 0


@contextmanager
def peak_growth(device: torch.device) -> Iterator[Growth]:
    """Measure the memory that a block takes on a GPU. It resets the allocator's peak."""
    growth = Growth()
    if device.type != "cuda":
        yield growth
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield growth
    growth.bytes = torch.cuda.max_memory_allocated(device) - before


def fits_everywhere(missing_bytes: int, mesh: Mesh, work: int = 0) -> bool:
    """Whether `missing_bytes` of weights fit in SHARE_FOR_WEIGHTS of the free memory of every rank. Collective.

    Args:
        work: bytes that must stay free besides.
    """
    free = free_bytes(mesh.device)
    return mesh.largest(missing_bytes - min(int(SHARE_FOR_WEIGHTS * free), free - work)) <= 0
