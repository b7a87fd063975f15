"""How does a warm start go? Clips, noised, each step; a loss on held-out clips; then the policy as a model folder.

One step is one update: |v - (noise - data)|^2 over `sft.batch_size` clips, which the ranks share. Noise, level and
whether a caption is left out depend on seed, step and clip alone, so that any number of ranks takes the same step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.checkpoints.checkpoint import Saved
from bpgo_video.config.sft import SftConfig, check_sft_world
from bpgo_video.data.atomic import write_json
from bpgo_video.parallel.heartbeat import Heartbeat
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.reports.metrics import MATCHING, RunLog, reduce_metrics
from bpgo_video.reports.summary import boxed, listed
from bpgo_video.training.course import Dates, launch, open_run, run_steps
from bpgo_video.training.saving import export, resume, save
from bpgo_video.training.sft_session import SftSession, build_sft_session, check_clips
from bpgo_video.training.stopping import StopRequests
from bpgo_video.training.stopwatch import Stopwatch

HeldoutLosses = Float[Tensor, "clips levels"]


@dataclass
class SftProgress:
    """What a warm start has done; with the weights, all that a checkpoint holds."""

    step: int = 0
    seconds: float = 0.0
    heldout_before: list[float] = field(default_factory=list)


def train_step(session: SftSession, step: int, heartbeat: Heartbeat) -> dict[str, float]:
    """One update; the step's record."""
    sft, watch = session.config.sft, Stopwatch(heartbeat, step)
    transformer = session.loss.transformer_of(step)
    shares = session.mesh.share(sft.batch_size, sft.micro_batch_size)
    learning_rate, losses = session.engine.learning_rate, []
    for number, places in enumerate(shares, start=1):
        with watch.phase("data"):
            clips = session.clips.read([session.clips.order.row(step * sft.batch_size + place) for place in places])
        with watch.phase("update"):
            loss = session.loss.errors(clips, step, transformer).mean()
            session.updates.backward(loss / len(shares), last=number == len(shares))
            losses.append(loss.detach())
    with watch.phase("update"):
        norm = session.updates.step()
    return {
        **reduce_metrics({"loss": torch.stack(losses).mean(), "grad_norm": norm}),
        "learning_rate": learning_rate,
        **watch.record,
    }


def heldout_losses(session: SftSession) -> HeldoutLosses | None:
    """The loss of every held-out clip at each of `evaluation.levels` levels, the same on every rank.

    Noise is keyed by the seed, the clip and the level. None where no split is held out.
    """
    rows, count = session.clips.heldout, len(session.clips.heldout)
    if not count:
        return None
    shares = session.mesh.share(count, session.config.sft.micro_batch_size)
    levels = session.loss.levels(session.config.evaluation.levels)
    with session.weights(session.config.evaluation.weights):
        found = [session.loss.errors_at(session.clips.read(rows[items].tolist()), levels) for items in shares]
    items = [item for share in shares for item in share]
    return session.mesh.gather(torch.cat(found), items, count).cpu()


def heldout_metrics(session: SftSession, losses: HeldoutLosses) -> dict[str, float]:
    """`heldout/loss`, and the same at each level."""
    levels = [f"heldout/loss_at_{float(sigma):.3f}" for sigma in session.loss.levels(losses.shape[1])]
    return {"heldout/loss": float(losses.mean()), **dict(zip(levels, losses.mean(dim=0).tolist(), strict=True))}


class WarmStart:
    """What a warm start does in each step, for the frame of course.py; the last held-out losses are `after`."""

    def __init__(self, session: SftSession, progress: SftProgress, started: float, heartbeat: Heartbeat) -> None:
        self.session, self.progress, self.started, self.heartbeat = session, progress, started, heartbeat
        self.after: HeldoutLosses | None = None

    def step(self, number: int) -> dict[str, float]:
        record = train_step(self.session, number, self.heartbeat)
        self.progress.step += 1
        return record

    def evaluate(self, step: int, last: bool, log: RunLog) -> dict[str, float]:
        self.after = heldout_losses(self.session)
        return {} if self.after is None else heldout_metrics(self.session, self.after)

    def save(self) -> Saved:
        self.progress.seconds = time.perf_counter() - self.started
        return save(self.session, self.progress.step, vars(self.progress))


def train(config: SftConfig) -> dict[str, Any] | None:
    """The whole run on this rank; its summary, the same on every rank, or None where the run was asked to stop.

    Raises:
        ConfigError, ShardError, CheckpointError, FloatingPointError: say what is wrong and what to do.
    """
    return launch(config, run)


def run(config: SftConfig, mesh: Mesh, heartbeat: Heartbeat, requests: StopRequests) -> dict[str, Any] | None:
    """From the checks to the summary, under the heartbeat's watch."""
    started, run_dir = time.perf_counter(), Path(config.run.dir)
    check_sft_world(config, mesh.world_size)
    mesh, (ds_config, shards), resume_from = open_run(config, mesh, requests, check_clips)
    session = build_sft_session(config, mesh, ds_config, shards)
    progress = SftProgress()
    if resume_from is not None:
        progress = SftProgress(**resume(session, run_dir, resume_from))
        started -= progress.seconds
    else:
        heartbeat.enter("evaluation")
        before = heldout_losses(session)
        progress.heldout_before = [] if before is None else before.mean(dim=1).tolist()
    work = WarmStart(session, progress, started, heartbeat)
    with RunLog(run_dir, config.wandb, config.run.num_steps, progress.step, vars(config), MATCHING) as log:
        dates = Dates(progress.step, config.run.num_steps, config.evaluation.every, config.run.save_every)
        if not run_steps(work, dates, log, heartbeat, requests):
            return None
    after = heldout_losses(session) if work.after is None else work.after
    heartbeat.enter("export")
    export(session, run_dir)
    progress.seconds = time.perf_counter() - started
    summary = summarise(session, progress, after)
    if mesh.is_main:
        write_results(session, run_dir, summary)
    mesh.barrier()
    return summary


def summarise(session: SftSession, progress: SftProgress, after: HeldoutLosses | None) -> dict[str, Any]:
    """The fields of summary.json; held-out ones are means over clips and levels."""
    config = session.config
    clips = progress.step * config.sft.batch_size
    found: dict[str, Any] = {
        "algorithm": config.algorithm,
        "steps": progress.step,
        "world_size": session.mesh.world_size,
        "zero_stage": session.engine.stage,
        "seed": config.run.seed,
        "clips": clips,
        "epochs": clips / len(session.clips.shards.rows(config.data.split)),
        "seconds": {"total": round(progress.seconds, 3)},
    }
    if after is None:
        return found
    before = torch.tensor(progress.heldout_before)
    change = after.mean(dim=1) - before
    return found | {
        "heldout_loss_before": float(before.mean()),
        "heldout_loss_after": float(after.mean()),
        "heldout_loss_difference_stderr": float(change.std() / len(change) ** 0.5) if len(change) > 1 else None,
        "heldout_clips": len(change),
    }


def write_results(session: SftSession, run_dir: Path, summary: dict[str, Any]) -> None:
    """summary.json, and on the screen a table and where everything lies."""
    write_json(run_dir / "summary.json", summary)
    forms = {
        "heldout_loss_before": "{:.4f}",
        "heldout_loss_after": "{:.4f}",
        "steps": "{:,}",
        "clips": "{:,}",
        "epochs": "{:.2f}",
    }
    rows = [(key.replace("_", " "), form.format(summary[key])) for key, form in forms.items() if key in summary]
    names: Sequence[str] = ("summary.json", "metrics.jsonl", "config.yaml", "checkpoints", "export")
    names = [*names, *(["export-ema"] if session.ema else [])]
    print("\n".join([boxed(rows), *listed({name: run_dir / name for name in names})]))
