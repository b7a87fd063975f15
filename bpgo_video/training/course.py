"""How does any run go on, whatever it trains? Opened or resumed, step after step, saved, stopped when asked to.

A recipe brings its own steps (`Work`). Here are the dates of evaluations and checkpoints, the record, signals and the
watch over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from bpgo_video.checkpoints.checkpoint import Saved
from bpgo_video.config.sft import Recipe
from bpgo_video.parallel.agreement import same_verdict
from bpgo_video.parallel.heartbeat import Heartbeat
from bpgo_video.parallel.mesh import Mesh, make_mesh
from bpgo_video.reports.metrics import RunLog
from bpgo_video.training.run_folder import check_run_dir, open_run_dir
from bpgo_video.training.stopping import Request, StopRequests
from bpgo_video.zero import engine

GO_ON = "The run goes on from its last checkpoint with the same command and --run.resume auto."

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
Inputs = TypeVar("Inputs")
Summary = dict[str, Any]


@runtime_checkable
class Work(Protocol):
    """What a recipe does; every rank calls each at the same time."""

    def step(self, number: int) -> dict[str, float]:
        """Train one step; its record."""
        ...

    def evaluate(self, step: int, last: bool, log: RunLog) -> dict[str, float]:
        """Measure the policy behind a step; what the step's record says of it."""
        ...

    def save(self) -> Saved:
        """A checkpoint of the steps so far."""
        ...


@dataclass(frozen=True)
class Dates:
    """When what is due.

    Attributes:
        first: step that comes next.
        total: steps of the run.
        evaluate_every: steps between evaluations; 0 for behind the last alone.
        save_every: steps between checkpoints; the last step is always saved.
    """

    first: int
    total: int
    evaluate_every: int
    save_every: int


def launch(
    config: AnyRecipe, run: Callable[[AnyRecipe, Mesh, Heartbeat, StopRequests], Summary | None]
) -> Summary | None:
    """`run` on all ranks that the launcher started, with an ear for signals and an eye on the other ranks."""
    mesh = engine.start_ranks()
    # A launcher terminates the survivors of a dead rank: the handler must outlast the heartbeat's wait for the verdict.
    with (
        StopRequests(Path(config.run.dir), mesh) as requests,
        Heartbeat(mesh, config.parallel.heartbeat_timeout, advice=GO_ON) as heartbeat,
    ):
        return run(config, mesh, heartbeat, requests)


def open_run(
    config: AnyRecipe, mesh: Mesh, requests: StopRequests, check_inputs: Callable[[AnyRecipe, Mesh], Inputs]
) -> tuple[Mesh, Inputs, str | None]:
    """The mesh with its sequence groups, the inputs once they are checked, and the checkpoint to go on from, if any."""
    mesh = make_mesh(mesh.device, config.parallel.sequence)
    torch.manual_seed(config.run.seed)
    with same_verdict(mesh):
        check_run_dir(config)
    inputs = check_inputs(config, mesh)
    resume_from = open_run_dir(config, mesh)
    requests.forget_files()
    return mesh, inputs, resume_from


def run_steps(work: Work, dates: Dates, log: RunLog, heartbeat: Heartbeat, requests: StopRequests) -> bool:
    """The loop, from `dates.first` to the end; False where it was asked to stop before."""
    for step in range(dates.first, dates.total):
        record, done = work.step(step), step + 1
        last = done == dates.total
        if last or (dates.evaluate_every and done % dates.evaluate_every == 0):
            heartbeat.enter("evaluation", step)
            record |= work.evaluate(step, last, log)
        log.log(step, record)
        request = Request.NONE if last else requests.agreed()
        if last or request or done % dates.save_every == 0:
            heartbeat.enter("checkpoint", step)
            saved = work.save()
            log.later(str(saved), saved.metrics())
            requests.obeyed(request, f"after {done} of {dates.total} steps, in {saved.folder}")
        if request is Request.STOP:
            return False
    return True
