"""Memory and cores available to a rank: container limits, read from kernel files, and each rank's share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bpgo_video.distributed import memory
from bpgo_video.distributed.mesh import Mesh

GIB = 2**30
ALONE = Mesh(0, 1, torch.device("cpu"))


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory").mkdir()
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n", "utf-8")


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": f"{GIB}", "memory.current": f"{GIB // 2}", "memory.stat": "anon 5\ninactive_file 1000"},
        {
            "memory/memory.limit_in_bytes": f"{GIB}",
            "memory/memory.usage_in_bytes": f"{GIB // 2}",
            "memory/memory.stat": "cache 7\ninactive_file 3\ntotal_inactive_file 1000",
        },
    ],
    ids=["cgroup 2", "cgroup 1"],
)
def test_the_free_memory_of_a_container_includes_file_caches(cgroup: Path, files: dict[str, str]) -> None:
    write(cgroup, files)
    assert memory.available_memory() == GIB // 2 + 1000


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"memory.max": "max", "memory.current": "5", "memory.stat": "anon 5"},
        {
            "memory/memory.limit_in_bytes": f"{2**63 - 4096}",
            "memory/memory.usage_in_bytes": "5",
            "memory/memory.stat": "cache 7",
        },
    ],
    ids=["no files", "cgroup 2", "cgroup 1"],
)
def test_without_a_limit_the_machines_memory_counts(
    cgroup: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(cgroup, files)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 12345}))
    assert memory.available_memory() == 12345


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_a_cpu_time_quota_reduces_the_cores(cgroup: Path, files: dict[str, str], cores: int) -> None:
    write(cgroup, files)
    assert memory.available_cores() == cores


@pytest.mark.parametrize(("missing", "fits"), [(400, True), (500, True), (501, False)])
def test_gathered_weights_may_take_half_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, missing: int, fits: bool
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert memory.fits_everywhere(missing, ALONE) is fits


@pytest.mark.parametrize(("work", "fits"), [(600, True), (601, False)])
def test_gathered_weights_leave_room_for_the_work(monkeypatch: pytest.MonkeyPatch, work: int, fits: bool) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert memory.fits_everywhere(400, ALONE, work) is fits


def test_ranks_of_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = memory.free_bytes(ALONE.device)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert memory.free_bytes(ALONE.device) == pytest.approx(alone / 4, rel=0.2)
