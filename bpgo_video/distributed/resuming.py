"""How does a run go on from a checkpoint? As it was written, on other ranks or stages, or with a fresh optimiser."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from more_itertools import constrained_batches

from bpgo_video.distributed.agreement import all_or_none, rank0_first
from bpgo_video.distributed.checkpoint import ASIDE, Layout, read_layout
from bpgo_video.distributed.engine import Engine
from bpgo_video.distributed.master_weights import Shard
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.shard_files import SavedShards, save_shards
from bpgo_video.distributed.universal import to_universal
from bpgo_video.distributed.zero_files import CheckpointError, model_file, read_file, refuse_foreign_pickles
from bpgo_video.distributed.zero_parameters import ZeroParameters

Way = Literal["as written", "universal", "weights"]
WEIGHTS = "weights"
DONE = "done"
FILE_ELEMENTS = 500_000_000  # 2 GB


def load(engine: Engine, folder: Path, mesh: Mesh, optimizer: str = "keep") -> dict[str, Any]:
    """Put a checkpoint's weights, optimiser and schedule into the engine; the run's own state. All ranks call it.

    Args:
        optimizer: `keep` its state, or start it `fresh`.

    Raises:
        CheckpointError: another layout or dtype, stages that do not convert, or a file that names code to run.
    """
    with all_or_none(mesh):
        refuse_foreign_pickles(folder)
        way = way_of(read_layout(folder), Layout.of(engine, mesh), optimizer, engine.remembers, folder)
    return WAYS[way](engine, folder, mesh)


def way_of(written: Layout, here: Layout, optimizer: str, remembers: bool, folder: Path) -> Way:
    """How a checkpoint of the layout `written` comes into an engine of the layout `here`.

    Args:
        remembers: whether the optimiser has a state to keep.

    Raises:
        CheckpointError: it does not; with the way out.
    """
    if written.dtype != here.dtype:
        raise CheckpointError(
            f"{folder} was written by a model in {written.dtype}, this run computes in {here.dtype}: take the "
            "DeepSpeed JSON that it was started with, or start another run"
        )
    if written == here and optimizer == "keep":
        return "as written"
    if optimizer == "fresh" or not remembers:
        return "weights"
    if (written.zero_stage == 3) == (here.zero_stage == 3):
        return "universal"
    raise CheckpointError(
        f"{folder} was written under ZeRO {written.zero_stage}, this run has ZeRO {here.zero_stage}: DeepSpeed does "
        "not convert optimiser states between stage 3 and the others; go on under the stage that it was written with, "
        "or start a fresh optimizer with --run.resume-optimizer fresh (all else is kept)"
    )


def _as_written(engine: Engine, folder: Path, mesh: Mesh) -> dict[str, Any]:
    return engine.load(folder.parent, folder.name)


def _by_universal_files(engine: Engine, folder: Path, mesh: Mesh) -> dict[str, Any]:
    """Through files that rank 0 makes of the checkpoint; they take its size once more until all have read them."""
    aside = folder.with_name(f"{ASIDE}universal")
    rank0_first(lambda: to_universal(folder, aside / folder.name), mesh, aside / DONE)
    state = engine.load(aside, folder.name, universal=True)
    _remove(aside, mesh)
    return state


def _by_weights(engine: Engine, folder: Path, mesh: Mesh) -> dict[str, Any]:
    """The masters and the schedule alone; each rank reads its own elements of what rank 0 has put together."""
    aside = folder.with_name(f"{ASIDE}{WEIGHTS}")
    rank0_first(lambda: _write_weights(folder, aside), mesh, aside / DONE)
    with all_or_none(mesh), SavedShards(aside, WEIGHTS) as saved:
        for shard in engine.masters.shards():
            shard.values.copy_(saved.elements(shard))
    engine.masters.publish()
    _remove(aside, mesh)
    state = read_file(model_file(folder))
    engine.continue_schedule(state["lr_scheduler"])
    return state


def _write_weights(folder: Path, aside: Path) -> None:
    """A checkpoint's whole parameters, in files of a few gigabytes, of which one is in memory at a time."""
    aside.mkdir()
    whole = (Shard(name, tuple(tensor.shape), 0, tensor.flatten()) for name, tensor in ZeroParameters(folder).items())
    for number, shards in enumerate(constrained_batches(whole, FILE_ELEMENTS, get_len=elements_of, strict=False)):
        save_shards(shards, aside, WEIGHTS, number)


def elements_of(shard: Shard) -> int:
    return shard.values.numel()


def _remove(aside: Path, mesh: Mesh) -> None:
    mesh.barrier()
    if mesh.is_main:
        shutil.rmtree(aside)


WAYS: dict[Way, Callable[[Engine, Path, Mesh], dict[str, Any]]] = {
    "as written": _as_written,
    "universal": _by_universal_files,
    "weights": _by_weights,
}
