"""Checkpoints of a run: saved complete or not at all, pruned, and resumed on any number of ranks.

    RUN/checkpoints/step-000050/   DeepSpeed's files, one part per rank, with the run's state
    RUN/checkpoints/latest         the name of the newest complete one; written last

A checkpoint is written to `partial-...`, flushed to disk by the ranks that wrote it, and renamed once all have done so.
An old one is renamed before it is removed. So every `step-...` is complete at any moment; the next save or resume
removes leftovers. No random state is stored, since every random draw is keyed.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from bpgo_video.config.run import RunConfig
from bpgo_video.distributed import zero_files
from bpgo_video.distributed.engine import Engine
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_main, rank0_first
from bpgo_video.distributed.zero_files import CheckpointError
from bpgo_video.files import atomic_file, flush, write_json

LAYOUT_VERSION = 3
LAYOUT = "layout.json"
FOLDER = "checkpoints"
LATEST = "latest"
PARTIAL = "partial-"
WRITER_ERRORS = ("inline_container", "PytorchStreamWriter", "iostream error")  # in torch's messages

Part = Callable[[Path, int], None]  # writes a rank's further files: (folder, rank)
ResumeMode = Literal["as written", "universal", "weights"]


@dataclass(frozen=True)
class Layout:
    """The content of layout.json: what decides how a checkpoint can be read."""

    world_size: int
    zero_stage: int
    dtype: str
    version: int = LAYOUT_VERSION


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint, its size over all ranks, and how long the ranks waited for it."""

    folder: Path
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"checkpoint {self.folder.name}: {self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s"

    def metrics(self) -> dict[str, float]:
        return {"seconds/checkpoint": self.seconds, "checkpoint/bytes": float(self.bytes)}


def layout_of(engine: Engine, mesh: Mesh) -> Layout:
    return Layout(mesh.world_size, engine.stage, str(engine.dtype))


def save(
    engine: Engine, run: RunConfig, step: int, state: Mapping[str, Any], mesh: Mesh, parts: Sequence[Part] = ()
) -> Saved:
    """Write the checkpoint of a finished `step`. Collective; it is complete when any rank returns.

    Raises:
        CheckpointError: it could not be written; the one before is intact. A rank that fails while others wait in
            DeepSpeed's own barriers raises alone, and the heartbeat ends them.
    """
    started, run_dir = time.perf_counter(), Path(run.dir)
    folder = run_dir / FOLDER / f"step-{step:06d}"
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    with all_or_none(mesh), _write_errors(run_dir, step):
        if mesh.is_main:
            clear_leftovers(run_dir)
    with _write_errors(run_dir, step):
        engine.save(partial.parent, partial.name, state)
    with all_or_none(mesh), _write_errors(run_dir, step):
        if mesh.is_main:
            write_json(partial / LAYOUT, asdict(layout_of(engine, mesh)))
        for write in parts:
            write(partial, mesh.rank)
        for path in files_of_rank(mesh.rank, partial):
            flush(path)
    with all_or_none(mesh), _write_errors(run_dir, step):
        if mesh.is_main:
            _publish(partial, folder)
            _prune(folder, run)
    size = sum(path.stat().st_size for path in folder.rglob("*")) if mesh.is_main else 0
    return Saved(folder, from_main(size, mesh), time.perf_counter() - started)


def _publish(partial: Path, folder: Path) -> None:
    """Turn a completely written folder into the newest checkpoint; each change is on disk before the next."""
    for path in [*partial.rglob("*"), partial]:
        flush(path)
    if folder.exists():  # from a launch that ended before it could update `latest`
        _remove(folder)
    partial.rename(folder)
    flush(folder.parent)
    with atomic_file(folder.parent / LATEST) as path:
        path.write_text(folder.name, "utf-8")


def _prune(newest: Path, run: RunConfig) -> None:
    """Remove all but the newest `keep_checkpoints` and the multiples of `keep_every`."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in newest.parent.glob("step-*") if path != newest)
    for step in steps[: max(0, len(steps) + 1 - run.keep_checkpoints)]:
        if not run.keep_every or step % run.keep_every:
            _remove(newest.with_name(f"step-{step:06d}"))


def _remove(folder: Path) -> None:
    """Remove a checkpoint such that a kill leaves it complete, or under a `partial-` name."""
    renamed = folder.with_name(f"{PARTIAL}old-{folder.name}")
    folder.rename(renamed)
    shutil.rmtree(renamed)


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
    name = latest.read_text("utf-8").strip()
    if not (run_dir / FOLDER / name).is_dir():
        raise CheckpointError(f"{latest} names {name!r}, which does not exist; write an existing step-... into it")
    return name


def read_layout(folder: Path) -> Layout:
    """A checkpoint's layout.

    Raises:
        CheckpointError: it has another version.
    """
    path = folder / LAYOUT
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {"version": 1}
    if found["version"] != LAYOUT_VERSION:
        raise CheckpointError(f"{folder} has layout version {found['version']}, this program reads {LAYOUT_VERSION}")
    return Layout(**found)


def load(engine: Engine, folder: Path, mesh: Mesh, optimizer: str = "keep") -> dict[str, Any]:
    """Load a checkpoint's weights, optimizer and schedule into the engine; the run's state. Collective.

    Args:
        optimizer: `keep` its state, or start `fresh`.

    Raises:
        CheckpointError: another layout or dtype, ZeRO stages that do not convert, or a file that names code.
    """
    with all_or_none(mesh):
        zero_files.refuse_foreign_pickles(folder)
        mode = resume_mode(read_layout(folder), layout_of(engine, mesh), optimizer, engine.has_optimizer_state, folder)
    if mode == "universal":
        return _load_universal(engine, folder, mesh)
    return _load_weights(engine, folder, mesh) if mode == "weights" else engine.load(folder.parent, folder.name)


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
    if optimizer == "fresh" or not has_optimizer_state:
        return "weights"
    if (written.zero_stage == 3) == (here.zero_stage == 3):
        return "universal"
    raise CheckpointError(
        f"{folder} was written under ZeRO {written.zero_stage}, this run has ZeRO {here.zero_stage}: DeepSpeed does "
        "not convert optimizer states between stage 3 and the others; use the stage that wrote it, or start a fresh "
        "optimizer with --run.resume-optimizer fresh (everything else is kept)"
    )


def _load_universal(engine: Engine, folder: Path, mesh: Mesh) -> dict[str, Any]:
    """Load through universal files, which rank 0 writes; they need the checkpoint's size again for a while."""
    partial = folder.with_name(f"{PARTIAL}universal")
    rank0_first(lambda: zero_files.to_universal(folder, partial / folder.name), mesh, partial / "done")
    state = engine.load(partial, folder.name, universal=True)
    mesh.barrier()
    if mesh.is_main:
        shutil.rmtree(partial)
    return state


def _load_weights(engine: Engine, folder: Path, mesh: Mesh) -> dict[str, Any]:
    """Load the masters and the schedule alone; each rank reads its own elements from all ranks' files."""
    with all_or_none(mesh):
        saved = zero_files.ZeroParameters(folder)
        for shard in engine.masters.shards():
            saved.load_into(shard)
    engine.masters.publish()
    state: dict[str, Any] = zero_files.read_file(zero_files.model_file(folder))
    engine.continue_schedule(state["lr_scheduler"])
    return state
