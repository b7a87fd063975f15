"""The memory and the cores that a container may use: what its control group (cgroup 2 or 1) leaves of the machine's."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
MEMORY = (  # limit, what is used of it, and where the part that the kernel gives back on demand is listed
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_memory() -> int:
    """Bytes that this machine has available, or fewer where the control group is nearer to its limit."""
    room = psutil.virtual_memory().available
    for limit, used, statistics, cache in MEMORY:
        allowed = _number(limit)
        if allowed is not None:
            listed = dict(line.split() for line in (CGROUP / statistics).read_text("utf-8").splitlines())
            room = min(room, allowed - (_number(used) or 0) + int(listed.get(cache, 0)))
    return max(room, 0)


def available_cores() -> int:
    """Cores that this process may run on, or fewer where the control group's share of time is less."""
    quota, period = _number("cpu/cpu.cfs_quota_us"), _number("cpu/cpu.cfs_period_us")
    if (file := CGROUP / "cpu.max").is_file():
        quota, period = (int(word) if word.isdigit() else None for word in file.read_text("utf-8").split())
    cores = len(os.sched_getaffinity(0))
    return min(cores, max(1, quota // period)) if quota and period and quota > 0 else cores


def _number(name: str) -> int | None:
    """Of a file of the control group; None where there is none, or no limit ("max")."""
    file = CGROUP / name
    text = file.read_text("utf-8").strip() if file.is_file() else ""
    return int(text) if text.lstrip("-").isdigit() else None
