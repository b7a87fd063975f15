"""The training loop: open or resume a run; step, evaluate, save and stop on request; export and summarize.

A kind of training (`rl.py`, `sft.py`) is a `Trainer`. Everything around its steps is here.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from bpgo_video.config.sft import Recipe
from bpgo_video.distributed import checkpoint, engine
from bpgo_video.distributed.agreement import all_or_none
from bpgo_video.distributed.ema import load_average, save_average
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh, make_mesh
from bpgo_video.inference.model_card import EXPORTED, CardFacts
from bpgo_video.inference.model_files import export_pipeline
from bpgo_video.policies.networks import trained_names
from bpgo_video.training.metrics import Keys, RunLog
from bpgo_video.training.policy_session import PolicySession
from bpgo_video.training.run_folder import check_run_dir, open_run_dir
from bpgo_video.training.stopping import Request, StopRequests

CONTINUES = "The run continues from its last checkpoint with the same command and --run.resume auto."


class Trainer(ABC):
    """A kind of training. Every rank calls each method at the same time.

    Attributes:
        keys: what every record of metrics.jsonl must have.
        session: the policy under its engine, and what the kind needs beside it.
        progress: a dataclass of plain data with `step` and `seconds["total"]`; checkpoints keep it.
    """

    keys: ClassVar[Keys]
    session: Any
    progress: Any

    @abstractmethod
    def __init__(self, config: Any, mesh: Mesh, inputs: Any, heartbeat: Heartbeat) -> None:
        """Build the session from inputs that are checked."""

    @staticmethod
    @abstractmethod
    def check_world(config: Any, world_size: int) -> None:
        """Check that a step's samples divide over the ranks. Raises ConfigError."""

    @staticmethod
    @abstractmethod
    def check_inputs(config: Any, mesh: Mesh) -> Any:
        """Read the inputs and check everything that can be wrong before a model is loaded."""

    @abstractmethod
    def begin(self) -> None:
        """Measure the policy before the first step."""

    @abstractmethod
    def train_step(self, step: int) -> dict[str, float]:
        """Train one step; its record."""

    @abstractmethod
    def evaluate(self, step: int, last: bool, log: RunLog) -> dict[str, float]:
        """Measure the policy after a step; what the step's record says of it."""

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """The run's summary, the same on every rank; rank 0 writes the results."""


def train(config: Recipe, kind: type[Trainer]) -> dict[str, Any] | None:
    """The whole run on this rank; its summary, the same on every rank, or None if it was stopped on request.

    Raises:
        ConfigError, ShardError, RewardError, CheckpointError, FloatingPointError: say what is wrong and what to do.
    """
    mesh, run_dir = engine.start_ranks(), Path(config.run.dir)
    # A launcher terminates the survivors of a dead rank: the handler must outlast the heartbeat's wait for the verdict.
    with (
        StopRequests(run_dir, mesh) as requests,
        Heartbeat(mesh, config.parallel.heartbeat_timeout, advice=CONTINUES) as heartbeat,
    ):
        started = time.perf_counter()
        trainer, name = open_run(config, kind, mesh, requests, heartbeat)
        progress = trainer.progress
        if name is None:
            heartbeat.enter("evaluation")
            trainer.begin()
        else:
            vars(progress).update(load(trainer.session, run_dir / checkpoint.FOLDER / name))
            started -= progress.seconds["total"]
        with RunLog(run_dir, config.wandb, config.run.num_steps, progress.step, vars(config), kind.keys) as log:
            for step in range(progress.step, config.run.num_steps):
                record = trainer.train_step(step)
                progress.step = step + 1
                last = progress.step == config.run.num_steps
                if last or is_due(progress.step, config.evaluation.every):
                    heartbeat.enter("evaluation", step)
                    record |= trainer.evaluate(step, last, log)
                log.log(step, record)
                request = Request.NONE if last else requests.agreed()
                if last or request or is_due(progress.step, config.run.save_every):
                    heartbeat.enter("checkpoint", step)
                    progress.seconds["total"] = time.perf_counter() - started
                    saved = save(trainer.session, progress.step, vars(progress))
                    log.later(str(saved), saved.metrics())
                    requests.obeyed(request, f"after {step + 1} of {config.run.num_steps} steps, in {saved.folder}")
                if request is Request.STOP:
                    return None
        heartbeat.enter("export")
        export(trainer.session, run_dir)
        progress.seconds["total"] = time.perf_counter() - started
        summary = trainer.finish()
        mesh.barrier()
        return summary


def open_run(
    config: Recipe, kind: type[Trainer], mesh: Mesh, requests: StopRequests, heartbeat: Heartbeat
) -> tuple[Trainer, str | None]:
    """The trainer, built from checked inputs, and the name of the checkpoint to continue from, if any."""
    kind.check_world(config, mesh.world_size)
    mesh = make_mesh(mesh.device, config.parallel.sequence)
    torch.manual_seed(config.run.seed)
    with all_or_none(mesh):
        check_run_dir(config)
    inputs = kind.check_inputs(config, mesh)
    name = open_run_dir(config, mesh)
    requests.forget_files()
    return kind(config, mesh, inputs, heartbeat), name


def is_due(steps: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this many; 0 is never."""
    return every > 0 and steps % every == 0


def save(session: PolicySession, step: int, progress: Mapping[str, Any]) -> checkpoint.Saved:
    """A checkpoint of the finished step; `progress`, plain data, comes back from `load`."""
    parts = [partial(save_average, session.ema)] if session.ema else []
    state = {"progress": progress, "code": session.code}
    return checkpoint.save(session.engine, session.config.run, step, state, session.mesh, parts)


def load(session: PolicySession, folder: Path) -> dict[str, Any]:
    """Put a checkpoint into the session; the run's progress by then."""
    state = checkpoint.load(session.engine, folder, session.mesh, session.config.run.resume_optimizer)
    if session.ema:
        load_average(session.ema, folder)
    earlier = state.get("code", [])
    session.code[:] = [*earlier, *(one for one in session.code if one not in earlier[-1:])]
    return dict(state["progress"])


def export(session: PolicySession, run_dir: Path) -> None:
    """The trained weights in RUN/export, and their average, if the run keeps one, in RUN/export-ema."""
    names = trained_names(session.policy.folder, session.config.policy.trained)
    write = partial(export_pipeline, session.engine, session.policy, names, mesh=session.mesh)
    card = CardFacts(session.config, session.config.run.num_steps, "raw", EXPORTED, session.code)
    write(output=run_dir / "export", card=card)
    if session.ema:
        with session.ema.weights():
            write(output=run_dir / "export-ema", card=replace(card, weights="ema"))
