"""Reading a run's checkpoints: which one is intact, and its state into an engine of any layout.

A run continues from the newest checkpoint whose files are what was saved. On as many ranks and under the same ZeRO
stage, DeepSpeed loads them, and the run continues to the bit. Otherwise each rank copies its own elements from all
files.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from bpgo_video.distributed import zero_files
from bpgo_video.distributed.checkpoint import FOLDER, layout_of, newest, step_of
from bpgo_video.distributed.engine import Engine
from bpgo_video.distributed.manifest import CheckpointError, Layout, check_files, read_manifest
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_all, from_main
from bpgo_video.distributed.optimizer import MOMENTS

DAMAGED = "damaged-"

ResumeMode = Literal["as written", "elements", "weights"]


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
        by_size = sorted(manifest.files, key=lambda name: manifest.files[name].bytes)  # equal shares of every kind
        check_files(folder, manifest, by_size[rank::world_size])
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
