"""Checkpoints of a run: saved complete or not at all, and pruned; `resume.py` reads them.

    RUN/checkpoints/step-000050/   DeepSpeed's files, one part per rank, with the run's state, and their manifest
    RUN/checkpoints/latest         the name of the newest complete one; written last

A checkpoint is written to `partial-...`, by each rank while it trains on (`snapshot.py`), and flushed to disk. Once all
ranks have done so, it gets its manifest and is renamed. An old one is renamed before it is removed. So every `step-...`
is complete at any moment; the next save or resume removes leftovers. No random state is stored, since every random draw
is keyed.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bpgo_video.config.run import RunConfig
from bpgo_video.distributed.engine import Engine
from bpgo_video.distributed.manifest import (
    CheckpointError,
    File,
    Layout,
    Manifest,
    write_manifest,
)
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_all
from bpgo_video.distributed.snapshot import SaveFiles, Sink, begin
from bpgo_video.files import atomic_file, flush

FOLDER = "checkpoints"
LATEST = "latest"
PARTIAL = "partial-"
WRITER_ERRORS = ("inline_container", "PytorchStreamWriter", "iostream error")  # in torch's messages

Part = Callable[[Path, int, Sink], None]  # passes a rank's further files to the sink: (folder, rank, sink)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint, its size over all ranks, and what it cost.

    Attributes:
        seconds: that training waited for it.
        write_seconds: from its beginning until it was complete.
    """

    folder: Path
    bytes: int
    seconds: float
    write_seconds: float

    def __str__(self) -> str:
        return (
            f"checkpoint {self.folder.name}: {self.bytes / 1e6:,.1f} MB, written in {self.write_seconds:.1f} s; "
            f"training waited {self.seconds:.1f} s"
        )

    def metrics(self) -> dict[str, float]:
        return {
            "seconds/checkpoint": self.seconds,
            "checkpoint/write_seconds": self.write_seconds,
            "checkpoint/bytes": float(self.bytes),
        }


def layout_of(engine: Engine, mesh: Mesh) -> Layout:
    return Layout(mesh.world_size, engine.stage, str(engine.dtype))


@dataclass
class _Writing:
    """A checkpoint that this rank is writing."""

    step: int
    partial: Path
    files: Future[dict[Path, File]]
    started: float
    waited: float


class Saver:
    """Saves a run's checkpoints, one at a time. All ranks call each method together.

    Args:
        report: called on every rank with each complete checkpoint.
    """

    def __init__(self, engine: Engine, run: RunConfig, mesh: Mesh, report: Callable[[Saved], None]) -> None:
        self._engine, self._run, self._mesh, self._report = engine, run, mesh, report
        self._files = SaveFiles(run.save_async)
        self._writing: _Writing | None = None
        self._removed: Future[Any] = begin(list, in_thread=False)

    def save(self, step: int, state: Mapping[str, Any], parts: Sequence[Part] = ()) -> None:
        """Begin the checkpoint of a finished `step`, after completing the one before; without `save_async` complete it.

        Raises:
            CheckpointError: one of them could not be written; the ones before are intact. A rank that fails while
                others wait in DeepSpeed's own barriers raises alone, and the heartbeat ends them.
        """
        self.finish()
        started, mesh, run_dir = time.perf_counter(), self._mesh, Path(self._run.dir)
        folder = folder_of(run_dir, step)
        partial = folder.with_name(f"{PARTIAL}{folder.name}")
        with all_or_none(mesh), _write_errors(run_dir, step):
            if mesh.is_main:
                clear_leftovers(run_dir)
        with _write_errors(run_dir, step):
            self._engine.save(partial.parent, partial.name, state, self._files.put)
        with all_or_none(mesh), _write_errors(run_dir, step):
            for part in parts:
                part(partial, mesh.rank, self._files.put)
            self._engine.masters.before_change = self._files.wait_for_copies
            written = self._files.write(lambda: files_of_rank(mesh.rank, partial))
        self._writing = _Writing(step, partial, written, started, time.perf_counter() - started)
        if not self._run.save_async:
            self.finish()

    def poll(self) -> None:
        """Complete the checkpoint that is being written if every rank has written its part."""
        if self._writing and not self._mesh.largest(int(not self._writing.files.done())):
            self._complete(self._writing, in_thread=True)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it. Raises CheckpointError as `save`."""
        if self._writing:
            self._complete(self._writing, in_thread=False)
        with all_or_none(self._mesh):
            self._removed.result()

    def _complete(self, writing: _Writing, in_thread: bool) -> None:
        """Publish a checkpoint when this rank has written its part; rank 0 removes old ones, perhaps in a thread."""
        self._writing = None
        started, mesh, run_dir = time.perf_counter(), self._mesh, Path(self._run.dir)
        partial, folder = writing.partial, folder_of(run_dir, writing.step)
        with all_or_none(mesh), _write_errors(run_dir, writing.step):
            mine = {path.relative_to(partial).as_posix(): file for path, file in writing.files.result().items()}
        files = {name: file for part in from_all(mine, mesh) for name, file in part.items()}
        manifest = Manifest(writing.step, layout_of(self._engine, mesh), dict(sorted(files.items())))
        with all_or_none(mesh), _write_errors(run_dir, writing.step):
            if mesh.is_main:
                write_manifest(manifest, partial)
                old = [*_publish(partial, folder), *_outdated(folder, self._run)]
                self._removed = begin(lambda: list(map(shutil.rmtree, old)), in_thread)
        now = time.perf_counter()
        waited = writing.waited + self._files.waited + now - started
        self._report(Saved(folder, manifest.bytes, waited, now - writing.started))


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _publish(partial: Path, folder: Path) -> list[Path]:
    """Turn a completely written folder into the newest checkpoint; what is to be removed.

    Each change is on disk before the next.
    """
    flush(partial)
    old = [_renamed(folder)] if folder.exists() else []  # from a launch that ended before it could update `latest`
    partial.rename(folder)
    flush(folder.parent)
    with atomic_file(folder.parent / LATEST) as path:
        path.write_text(folder.name, "utf-8")
    return old


def _outdated(newest: Path, run: RunConfig) -> list[Path]:
    """Rename all but the newest `keep_checkpoints` and the multiples of `keep_every`; later ones are not the run's."""
    steps = sorted(step for step in map(step_of, newest.parent.glob("step-*")) if step < step_of(newest))
    old = steps[: max(0, len(steps) + 1 - run.keep_checkpoints)]
    return [
        _renamed(newest.with_name(f"step-{step:06d}")) for step in old if not run.keep_every or step % run.keep_every
    ]


def _renamed(folder: Path) -> Path:
    """A checkpoint that is to be removed, such that a kill leaves it complete, or under a `partial-` name."""
    return folder.rename(folder.with_name(f"{PARTIAL}old-{folder.name}"))


def clear_leftovers(run_dir: Path) -> None:
    """Remove what interrupted saves left: incomplete, and as large as a checkpoint."""
    for leftover in (run_dir / FOLDER).glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover)


@contextmanager
def _write_errors(run_dir: Path, step: int) -> Iterator[None]:
    """Turn the libraries' errors on a full disk into one that names the step, the free space and what is intact."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in WRITER_ERRORS):
            raise
        free = f"{shutil.disk_usage(run_dir).free / 1e9:,.1f} GB free"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {run_dir / FOLDER}, with {free} there: {error}; "
            f"the newest complete one is {newest(run_dir) or 'none yet'}, untouched: free some space, then continue "
            "with --run.resume auto"
        ) from error


def files_of_rank(rank: int, folder: Path) -> list[Path]:
    """A rank's own files: only the host that wrote a file can flush it reliably."""
    own = re.compile(rf"rank[_-]0*{rank}(?!\d)")
    return [path for path in folder.rglob("*") if own.search(path.name)]


def newest(run_dir: Path) -> str | None:
    """The name of the newest complete checkpoint, if there is one."""
    latest = run_dir / FOLDER / LATEST
    if not latest.is_file():
        return None
    name = latest.read_text("utf-8", "replace").strip()
    if not re.fullmatch(r"step-\d{6,}", name) or not (run_dir / FOLDER / name).is_dir():
        raise CheckpointError(f"{latest} names {name!r}, which does not exist; write an existing step-... into it")
    return name
