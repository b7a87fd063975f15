"""Equality of two runs: the last checkpoints are bit-equal, and the records have the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bpgo_video.distributed.manifest import MANIFEST
from bpgo_video.training.metrics import read_metrics

LOADERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text()),
    ".pt": partial(torch.load, weights_only=False),
    ".safetensors": load_file,
}
MEASURED = ("seconds", "checkpoint")  # keys that depend on the clock or the disk


def records(run_dir: Path) -> list[dict[str, Any]]:
    """A run's log without timings and sizes."""
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in record.items() if not key.startswith(MEASURED)} for record in found]


def assert_same(first: Any, second: Any, where: str) -> None:
    """Assert bit-equality at any depth; the progress entry `seconds` may differ."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, Mapping):
        assert list(first) == list(second), where
        for key in first:
            if key != "seconds":
                assert_same(first[key], second[key], f"{where} {key}")
    elif isinstance(first, Sequence) and not isinstance(first, str):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where} {index}")
    elif not hasattr(first, "__dict__"):
        assert first == second, where


def assert_same_run(first: Path, second: Path) -> None:
    """Assert equal weights, optimizer state, average, data position, prior statistics and records."""
    names = [(run_dir / "checkpoints" / "latest").read_text() for run_dir in (first, second)]
    assert names[0] == names[1]
    folders = [run_dir / "checkpoints" / names[0] for run_dir in (first, second)]
    files = sorted(path.name for path in folders[0].iterdir())
    assert files == sorted(path.name for path in folders[1].iterdir())
    assert any(name.startswith("ema-rank") for name in files)
    for name in set(files) - {MANIFEST}:  # its hashes depend on the seconds in the run's state
        load = LOADERS[Path(name).suffix]
        assert_same(load(folders[0] / name), load(folders[1] / name), name)
    assert records(first) == records(second)
