"""What does a run need to continue as if it had never stopped? Complete checkpoints, or none.

    RUN/checkpoints/step-000050/   what DeepSpeed wrote, every rank its part, with the run's own state
    RUN/checkpoints/latest         the newest complete one's name, moved last

A checkpoint is written aside under `partial-...`, flushed to the disk by the ranks that wrote it, and renamed when all
have; an old one is renamed before it is removed. So every `step-...` is complete at any moment. The next save or resume
removes leftovers. Random draws are keyed, so no generator's state is stored.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError

from bpgo_video.atomic import atomic_file, write_json
from bpgo_video.config.run import RunConfig
from bpgo_video.distributed.agreement import all_or_none, from_main
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.zero_files import CheckpointError

LAYOUT_VERSION = 3
LAYOUT = "layout.json"
FOLDER = "checkpoints"
LATEST = "latest"
ASIDE = "partial-"
FAILED_WRITES = ("inline_container", "PytorchStreamWriter", "iostream error")  # one is in what torch's writer raises


@dataclass(frozen=True)
class Layout:
    """What decides how a checkpoint can be read, in its layout.json."""

    world_size: int
    zero_stage: int
    dtype: str
    version: int = LAYOUT_VERSION

    @classmethod
    def of(cls, engine: Stateful, mesh: Mesh) -> Layout:
        return cls(mesh.world_size, engine.stage, str(engine.dtype))


@runtime_checkable
class Stateful(Protocol):
    """What a checkpoint needs of the engine."""

    stage: int
    dtype: torch.dtype

    def save(self, folder: Path, tag: str, state: Mapping[str, Any]) -> None:
        """Every rank writes its part, `state` too, into folder/tag."""
        ...


Part = Callable[[Path, int], None]  # writes what a rank keeps beside the engine's state: (folder, rank)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint, its size over all ranks and how long the ranks waited for it."""

    folder: Path
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"checkpoint {self.folder.name}: {self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s"

    def metrics(self) -> dict[str, float]:
        return {"seconds/checkpoint": self.seconds, "checkpoint/bytes": float(self.bytes)}


def save(
    engine: Stateful, run: RunConfig, step: int, state: Mapping[str, Any], mesh: Mesh, parts: Sequence[Part] = ()
) -> Saved:
    """Write the checkpoint of a finished `step`; all ranks call it, and it is complete when any of them returns.

    Raises:
        CheckpointError: it could not be written; the one before it stands. A rank that fails while others are inside
            DeepSpeed's own barriers raises alone: the heartbeat ends them.
    """
    started = time.perf_counter()
    folder = Path(run.dir) / FOLDER
    whole = folder / f"step-{step:06d}"
    aside = folder / f"{ASIDE}{whole.name}"
    told = partial(_told, Path(run.dir), step)
    with all_or_none(mesh), told():
        if mesh.is_main:
            clear_leftovers(Path(run.dir))
    with told():
        engine.save(folder, aside.name, state)
    with all_or_none(mesh), told():
        if mesh.is_main:
            write_json(aside / LAYOUT, asdict(Layout.of(engine, mesh)))
        for write in parts:
            write(aside, mesh.rank)
        _flush(_written_by(mesh.rank, aside))
    with all_or_none(mesh), told():
        if mesh.is_main:
            _publish(aside, whole)
            _prune(whole, run)
    size = sum(path.stat().st_size for path in whole.rglob("*")) if mesh.is_main else 0
    return Saved(whole, from_main(size, mesh), time.perf_counter() - started)


def _publish(aside: Path, whole: Path) -> None:
    """From a folder that every rank has written to the newest checkpoint; each step is on the disk before the next."""
    _flush([*aside.rglob("*"), aside])
    if whole.exists():  # of a launch that ended before it could move `latest`
        _discard(whole)
    aside.rename(whole)
    _flush([whole.parent])
    with atomic_file(whole.parent / LATEST) as path:
        path.write_text(whole.name, "utf-8")


def _prune(newest: Path, run: RunConfig) -> None:
    """Discard what is neither among the newest `keep_checkpoints` nor a multiple of `keep_every`."""
    others = sorted((path for path in newest.parent.glob("step-*") if path != newest), key=_step)
    for old in others[: max(0, len(others) + 1 - run.keep_checkpoints)]:
        if not run.keep_every or _step(old) % run.keep_every:
            _discard(old)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _discard(folder: Path) -> None:
    """Remove a checkpoint so that a kill leaves it whole, or under a name that none has."""
    gone = folder.with_name(f"{ASIDE}old-{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone)


def clear_leftovers(run_dir: Path) -> None:
    """Remove what saves that were broken off have left: it is no checkpoint, and takes the room of one."""
    for leftover in (run_dir / FOLDER).glob(f"{ASIDE}*"):
        shutil.rmtree(leftover)


@contextmanager
def _told(run_dir: Path, step: int) -> Iterator[None]:
    """What a full disk, and what libraries make of it, becomes: which save, why, and what is left."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in FAILED_WRITES):
            raise
        room = f"{shutil.disk_usage(run_dir).free / 1e9:,.1f} GB free"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {run_dir / FOLDER}, with {room} there: {error}; "
            f"the newest complete one is {newest(run_dir) or 'none yet'}, untouched: make room, then go on with "
            "--run.resume auto"
        ) from error


def _written_by(rank: int, folder: Path) -> list[Path]:
    """A rank's own files: only the host that wrote a file can be sure to flush it."""
    mine = re.compile(rf"rank[_-]0*{rank}(?!\d)")
    return [path for path in folder.rglob("*") if mine.search(path.name)]


def newest(run_dir: Path) -> str | None:
    """The name of the newest complete checkpoint, None where there is none yet."""
    latest = run_dir / FOLDER / LATEST
    if not latest.is_file():
        return None
    name = latest.read_text("utf-8").strip()
    if not (run_dir / FOLDER / name).is_dir():
        raise CheckpointError(f"{latest} names {name!r}, which is not there; write an existing step-... into it")
    return name


def read_layout(folder: Path) -> Layout:
    """How a checkpoint was written.

    Raises:
        CheckpointError: it has another layout.
    """
    path = folder / LAYOUT
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {"version": 1}
    if found["version"] != LAYOUT_VERSION:
        raise CheckpointError(f"{folder} has layout version {found['version']}, this program reads {LAYOUT_VERSION}")
    return Layout(**found)


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
