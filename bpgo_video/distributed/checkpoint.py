"""Checkpoints of a run: saved complete or not at all, pruned, checked, and resumed on any number of ranks.

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
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from tqdm import tqdm

from bpgo_video.config.run import RunConfig
from bpgo_video.distributed import zero_files
from bpgo_video.distributed.engine import Engine
from bpgo_video.distributed.manifest import (
    CheckpointError,
    File,
    Layout,
    Manifest,
    check_files,
    read_manifest,
    write_manifest,
)
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_all, from_main
from bpgo_video.distributed.optimizer import MOMENTS
from bpgo_video.distributed.snapshot import SaveFiles, Sink, begin
from bpgo_video.files import atomic_file, flush

FOLDER = "checkpoints"
LATEST = "latest"
PARTIAL = "partial-"
DAMAGED = "damaged-"
WRITER_ERRORS = ("inline_container", "PytorchStreamWriter", "iostream error")  # in torch's messages

Part = Callable[[Path, int, Sink], None]  # passes a rank's further files to the sink: (folder, rank, sink)
ResumeMode = Literal["as written", "elements", "weights"]


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
        """Begin the checkpoint of a finished `step`, after completing the one before.

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
            written = self._files.write(lambda: files_of_rank(mesh.rank, partial))
        self._writing = _Writing(step, partial, written, started, time.perf_counter() - started)

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
        self._report(Saved(folder, manifest.bytes, writing.waited + now - started, now - writing.started))


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


def candidates(run_dir: Path) -> list[Path]:
    """The complete checkpoints that a run may continue from: `latest`, then the older ones, newest first."""
    name = newest(run_dir)
    if name is None:
        return []
    folders = sorted((run_dir / FOLDER).glob("step-*"), key=step_of, reverse=True)
    return [folder for folder in folders if step_of(folder) <= step_of(Path(name))]


def newest_intact(run_dir: Path, mesh: Mesh) -> Path | None:
    """The newest checkpoint whose files are what was saved; None if the run has none yet. Collective.

    The ranks share the files among them. A damaged checkpoint is reported, and renamed to `damaged-...`.

    Raises:
        CheckpointError: all are damaged.
    """
    with all_or_none(mesh):
        folders = candidates(run_dir) if mesh.is_main else []
    damaged: dict[Path, str] = {}
    for folder in from_main(folders, mesh):
        problems = [problem for problem in from_all(damage(folder, mesh.rank, mesh.world_size), mesh) if problem]
        if not problems:
            if mesh.is_main:
                _set_aside(damaged, folder)
            return Path(folder)
        damaged[folder] = problems[0]
    if damaged:
        raise CheckpointError(
            f"no checkpoint of {run_dir} is intact: {'; '.join(damaged.values())}; copy one back from a backup, or "
            "start another run with --run.dir"
        )
    return None


def damage(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint's manifest, or with a rank's share of its files; None if nothing is."""
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest, list(manifest.files)[rank::world_size])
    except CheckpointError as error:
        return f"{error}"
    return None


def _set_aside(damaged: Mapping[Path, str], used: Path) -> None:
    for folder, problem in damaged.items():
        aside = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        tqdm.write(
            f"warning: {problem}; the checkpoint is now {aside}, and the run continues from the newest intact one, "
            f"{used.name}",
            file=sys.stderr,
        )


def check(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Check a checkpoint, or a rank's share of its files, before its weights are used.

    Raises:
        CheckpointError: names the damaged file, and the newest checkpoint of the run that is intact.
    """
    if problem := damage(folder, rank, world_size):
        others = sorted(folder.parent.glob("step-*"), key=step_of, reverse=True)
        intact = next((other for other in others if other != folder and not damage(other)), None)
        raise CheckpointError(f"{problem}; {f'{intact} is intact' if intact else 'no other checkpoint is intact'}")


def load(engine: Engine, folder: Path, mesh: Mesh, optimizer: str = "keep") -> dict[str, Any]:
    """Load a checked checkpoint's weights, optimizer and schedule into the engine; the run's state. Collective.

    Args:
        optimizer: `keep` its state, or start `fresh`.

    Raises:
        CheckpointError: another dtype, or a file that names code.
    """
    with all_or_none(mesh):
        layout = read_manifest(folder).layout
        mode = resume_mode(layout, layout_of(engine, mesh), optimizer, engine.has_optimizer_state, folder)
    if mode == "as written":
        return engine.load(folder.parent, folder.name)
    return _load_elements(engine, folder, mesh, with_optimizer=mode == "elements")


def resume_mode(written: Layout, here: Layout, optimizer: str, has_optimizer_state: bool, folder: Path) -> ResumeMode:
    """How an engine of layout `here` loads a checkpoint of layout `written`.

    Raises:
        CheckpointError: it cannot; names the way out.
    """
    if written.dtype != here.dtype:
        raise CheckpointError(
            f"{folder} was written by a model in {written.dtype}, this run computes in {here.dtype}: use the DeepSpeed "
            "JSON that the run started with, or start another run"
        )
    if written == here and optimizer == "keep":
        return "as written"
    return "elements" if optimizer == "keep" and has_optimizer_state else "weights"


def _load_elements(engine: Engine, folder: Path, mesh: Mesh, with_optimizer: bool) -> dict[str, Any]:
    """Load from files of any number of ranks and any ZeRO stage: each rank reads its own elements from all of them.

    Tensors are mapped, not read, so that all ranks together read about one checkpoint.
    """
    with all_or_none(mesh):
        saved = zero_files.ZeroParameters(folder)
        for shard in engine.masters.shards():
            saved.load_into(shard)
        if with_optimizer:
            moments = {name: zero_files.ZeroParameters(folder, name) for name in MOMENTS}
            engine.masters.continue_moments(moments)
    engine.masters.publish()
    state: dict[str, Any] = zero_files.read_file(zero_files.model_file(folder))
    engine.continue_schedule(state["lr_scheduler"])
    return state
