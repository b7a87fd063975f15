"""What does a run need to continue as if it had never stopped? Complete checkpoints, or none.

    RUN/checkpoints/step-000050/   what DeepSpeed wrote, every rank its part, with the run's own state
    RUN/checkpoints/latest         the newest complete one's name, moved last

A checkpoint is written aside under `partial-...` and renamed when every rank is done; leftovers are removed by the next
save. Random draws are keyed, so no generator's state is stored.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpgo_video.data.atomic import atomic_file
from bpgo_video.engine import Engine
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.zero_files import CheckpointError, refuse_foreign_pickles

LAYOUT_VERSION = 1
FOLDER = "checkpoints"
LATEST = "latest"


def save(engine: Engine, run_dir: Path, step: int, state: Mapping[str, Any], keep: int, mesh: Mesh) -> Path:
    """Write the checkpoint of a finished `step`; all ranks call it, and it is complete when any of them returns."""
    folder = run_dir / FOLDER
    name = f"step-{step:06d}"
    partial = f"partial-{name}"
    if mesh.is_main:
        for leftover in folder.glob("partial-*"):
            shutil.rmtree(leftover)
    mesh.barrier()
    engine.save(folder, partial, {**state, "layout_version": LAYOUT_VERSION, "world_size": mesh.world_size})
    mesh.barrier()
    if mesh.is_main:
        _flush(folder / partial)
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / partial).rename(folder / name)
        with atomic_file(folder / LATEST) as path:
            path.write_text(name)
        others = sorted(path for path in folder.glob("step-*") if path.name != name)
        for old in others[: max(0, len(others) + 1 - keep)]:
            shutil.rmtree(old)
    mesh.barrier()
    return folder / name


def newest(run_dir: Path) -> str | None:
    """The name of the newest complete checkpoint, None where there is none yet."""
    latest = run_dir / FOLDER / LATEST
    if not latest.is_file():
        return None
    name = latest.read_text().strip()
    if not (run_dir / FOLDER / name).is_dir():
        raise CheckpointError(f"{latest} names {name!r}, which is not there; write an existing step-... into it")
    return name


def load(engine: Engine, run_dir: Path, name: str, mesh: Mesh) -> dict[str, Any]:
    """Put a checkpoint's weights and optimiser into the engine; the run's own state.

    Raises:
        CheckpointError: another layout or world size, or a file that names code to run.
    """
    folder = run_dir / FOLDER
    refuse_foreign_pickles(folder / name)
    written_by = sum(1 for _ in (folder / name).glob("*zero_pp_rank_*_optim_states.pt"))
    if written_by and written_by != mesh.world_size:
        raise CheckpointError(
            f"{folder / name} was written by {written_by} ranks, this run has {mesh.world_size}; "
            f"start it on {written_by}"
        )
    state = engine.load(folder, name)
    if state.get("layout_version") != LAYOUT_VERSION:
        raise CheckpointError(
            f"{folder / name} has layout version {state.get('layout_version')}, this program reads {LAYOUT_VERSION}"
        )
    return state


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
