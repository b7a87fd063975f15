"""The training loop: open or resume a run; then step, evaluate and save until it is finished or stopped on request.

`rl.py` and `sft.py` each have a `Trainer`. Everything around its steps is here.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bpgo_video.cli import print_error, show_loading_once
from bpgo_video.config.rules import OWNER, check_world
from bpgo_video.config.run import is_due, pauses_after
from bpgo_video.config.sft import Recipe
from bpgo_video.distributed import checkpoint, process_group, resume
from bpgo_video.distributed.ema import load_average, save_average
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.distributed.mesh import Mesh, all_or_none, make_mesh
from bpgo_video.errors import InputError
from bpgo_video.inference.hub import EXPORTED, CardFacts
from bpgo_video.inference.model_files import export_pipeline
from bpgo_video.policies.networks import trained_names
from bpgo_video.training.inputs import Inputs, check_inputs
from bpgo_video.training.lease import Lease
from bpgo_video.training.metrics import SKIPPED, Keys, RunLog
from bpgo_video.training.run_folder import check_run_dir, open_run_dir
from bpgo_video.training.session import PolicySession
from bpgo_video.training.stopping import Request, StopRequests
from bpgo_video.training.trackers import Trackers, named_trackers

ADVICE = "The run continues from its last checkpoint with the same command and --run.resume auto."
INPUT_ERRORS = (InputError, CheckpointError, FileNotFoundError, NotADirectoryError, PermissionError)


@contextmanager
def launched() -> Iterator[None]:
    """The body of a command that every rank runs; an error in its inputs ends it with exit code 2, no traceback."""
    show_loading_once()
    try:
        yield
    except INPUT_ERRORS as error:
        raise SystemExit(print_error(error)) from None
    process_group.stop_ranks()


class Trainer(ABC):
    """A kind of training. All ranks call each method together.

    Attributes:
        keys: keys that every record of metrics.jsonl must have.
        session: policy, engine and data.
        progress: a dataclass of plain data with `step` and `seconds["total"]`; checkpoints keep it.
        publish: completes the checkpoint that is being written, if it is written; a step calls it where it takes long.
    """

    keys: Keys
    session: Any
    progress: Any
    publish: Callable[[], object] = staticmethod(lambda: None)

    @abstractmethod
    def __init__(self, config: Any, mesh: Mesh, inputs: Inputs, heartbeat: Heartbeat) -> None:
        """Build the session from checked inputs."""

    @property
    def is_ahead(self) -> bool:
        """Whether part of the next step is done, which no checkpoint would hold."""
        return False

    @abstractmethod
    def begin(self) -> None:
        """Evaluate the policy before the first step."""

    @abstractmethod
    def train_step(self, step: int, pause: bool) -> dict[str, float]:
        """Train one step; returns its record.

        Args:
            pause: an evaluation, a checkpoint or the end of the run follows: do nothing of the next step.
        """

    @property
    def ended(self) -> str:
        """Why the run ends before its last step, in a sentence; empty if it does not."""
        return ""

    def notices(self, record: Mapping[str, float]) -> Sequence[str]:
        """What to say at once about a step's record; nothing twice."""
        return ()

    @abstractmethod
    def evaluate(self, step: int, last: bool, log: RunLog) -> dict[str, float]:
        """Evaluate the policy after a step; returns what to add to the step's record."""

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """The run's summary, the same on every rank; rank 0 writes the results."""


def train(config: Recipe, kind: type[Trainer]) -> dict[str, Any] | None:
    """Run a recipe on this rank.

    Returns:
        The summary, the same on every rank; None if the run was stopped on request.

    Raises:
        ConfigError, ShardError, RewardError, CheckpointError, FloatingPointError: with the cause and the way out.
    """
    mesh, run_dir, num_steps = process_group.start_ranks(), Path(config.run.dir), config.run.num_steps
    # When a rank dies, a launcher terminates the others. The handler outlasts the heartbeat, which names the cause.
    with (
        Lease(run_dir / OWNER) as lease,
        StopRequests(run_dir, mesh, config.run.save_minutes) as requests,
        Heartbeat(mesh, config.parallel.heartbeat_timeout, ADVICE, INPUT_ERRORS) as heartbeat,
    ):
        started, lease.on_loss = time.perf_counter(), heartbeat.abort
        trainer, resumed = open_run(config, kind, mesh, lease, requests, heartbeat)
        begin(trainer, resumed, heartbeat)
        progress = trainer.progress
        started -= progress.seconds["total"]  # of the launches before
        trackers = Trackers(named_trackers(config) if mesh.is_main else (), config, progress.step)
        with RunLog(run_dir, trackers, num_steps, progress.step, trainer.keys) as log:
            if not run_steps(trainer, started, log, lease, requests, heartbeat):
                return None
        heartbeat.enter("export")
        lease.check()
        export(trainer.session, run_dir, progress.step)
        progress.seconds["total"] = time.perf_counter() - started
        summary = trainer.finish()
        mesh.barrier()
        return summary


def begin(trainer: Trainer, resumed: Path | None, heartbeat: Heartbeat) -> None:
    """Evaluate the starting policy, or continue from a checkpoint."""
    if resumed is None:
        heartbeat.enter("evaluation")
        trainer.begin()
        return
    vars(trainer.progress).update(load(trainer.session, resumed))
    if trainer.session.mesh.is_main:
        print(f"continues after step {trainer.progress.step}, from {resumed}", flush=True)


def run_steps(
    trainer: Trainer, started: float, log: RunLog, lease: Lease, requests: StopRequests, heartbeat: Heartbeat
) -> bool:
    """Train, evaluate, log and save, step by step; whether the run is finished, not stopped on request."""
    session, progress = trainer.session, trainer.progress
    run, evaluation = session.config.run, session.config.evaluation
    saver = checkpoint.Saver(session.engine, run, session.mesh, lambda saved: log.later(str(saved), saved.metrics()))

    def publish() -> None:
        lease.check()
        saver.poll()

    trainer.publish, request = publish, Request.NONE
    for step in range(progress.step, run.num_steps):
        if trainer.ended:
            break
        pause = bool(request) or pauses_after(step + 1, run, evaluation.every)
        record = trainer.train_step(step, pause)
        publish()
        progress.step = step + 1
        for notice in trainer.notices(record):
            log.later(f"step {progress.step}: {notice}", {})
        last = progress.step == run.num_steps
        if last or is_due(progress.step, evaluation.every):
            heartbeat.enter("evaluation", step)
            record |= trainer.evaluate(step, last, log)
        if record.get(SKIPPED):
            log.later(f"step {progress.step}: {record[SKIPPED]:.0f} updates skipped, gradient not finite", {})
        log.log(step, record)
        progress.seconds["total"] = time.perf_counter() - started
        done = last or bool(trainer.ended)
        request = Request.NONE if done else requests.agreed()
        if done or is_due(progress.step, run.save_every) or (request and not trainer.is_ahead):
            heartbeat.enter("checkpoint", step)
            lease.check()
            save(saver, session, progress)
            if done or request > Request.DUE:
                saver.finish()
            folder = checkpoint.folder_of(Path(run.dir), progress.step)
            requests.fulfilled(request, f"after {progress.step} of {run.num_steps} steps, in {folder}")
            if request is Request.STOP:
                return False
            request = Request.NONE
    return True


def open_run(
    config: Recipe, kind: type[Trainer], mesh: Mesh, lease: Lease, requests: StopRequests, heartbeat: Heartbeat
) -> tuple[Trainer, Path | None]:
    """The trainer, built from checked inputs, and the checkpoint to resume from, if any."""
    check_world(config, mesh.world_size)
    mesh = make_mesh(mesh.device, config.parallel.sequence)
    torch.manual_seed(config.run.seed)
    with all_or_none(mesh):
        check_run_dir(config)
    inputs = check_inputs(config, mesh)
    resumed = open_run_dir(config, mesh, lease)
    requests.remove_files()
    return kind(config, mesh, inputs, heartbeat), resumed


def save(saver: checkpoint.Saver, session: PolicySession, progress: Any) -> None:
    """Begin a checkpoint with the run's progress."""
    parts = [partial(save_average, average) for average in session.averages]
    saver.save(progress.step, {"progress": vars(progress), "code": session.code}, parts)


def load(session: PolicySession, folder: Path) -> dict[str, Any]:
    """Load a checkpoint into the session; returns the run's progress."""
    state = resume.load(session.engine, folder, session.mesh, session.config.run.resume_optimizer)
    for average in session.averages:
        load_average(average, folder)
    earlier = state.get("code", [])
    session.code[:] = [*earlier, *(code for code in session.code if code not in earlier[-1:])]
    return dict(state["progress"])


def export(session: PolicySession, run_dir: Path, steps: int) -> None:
    """Write the weights of so many steps to RUN/export and their average, if any, to RUN/export-ema."""
    names = trained_names(session.policy.folder, session.config.policy.trained)
    write = partial(export_pipeline, session.engine, session.policy, names, mesh=session.mesh)
    card = CardFacts(session.config, steps, "raw", EXPORTED, session.code)
    write(output=run_dir / "export", card=card)
    if session.ema:
        with session.ema.weights():
            write(output=run_dir / "export-ema", card=replace(card, weights="ema"))


class Stopwatch:
    """Seconds of one training step by phase; the heartbeat shares the current phase with the other ranks.

    Args:
        phases: that the step's record names in any case.

    Attributes:
        seconds: by phase.
    """

    def __init__(self, heartbeat: Heartbeat, step: int, phases: Sequence[str] = ()) -> None:
        self.heartbeat, self.step = heartbeat, step
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float, dict.fromkeys(phases, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.heartbeat.enter(name, self.step)
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # not the device, which would wait for the scoring stream too
        self.seconds[name] += time.perf_counter() - started

    @property
    def record(self) -> dict[str, float]:
        """Entries of the step's record."""
        total = time.perf_counter() - self.started
        return {**{f"seconds/{name}": seconds for name, seconds in self.seconds.items()}, "seconds": total}
