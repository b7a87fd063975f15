"""The warm start: flow matching on video clips with captions, measured by the loss on held-out clips.

One step is one update: |v - (noise - data)|^2 over `sft.batch_size` clips, which the ranks share. Noise, level and
whether a caption is left out depend on seed, step and clip alone, so that any number of ranks takes the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.atomic import write_json
from bpgo_video.config.sft import SftConfig, check_sft_world
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.training import loop
from bpgo_video.training.metrics import MATCHING, RunLog, reduce_metrics
from bpgo_video.training.sft_session import SftSession, build_sft_session, check_clips
from bpgo_video.training.stopwatch import Stopwatch
from bpgo_video.training.summary import boxed, listed

HeldoutLosses = Float[Tensor, "clips levels"]


@dataclass
class SftProgress:
    """What a warm start has done; with the weights, all that a checkpoint holds."""

    step: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"total": 0.0})
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
            session.engine.backward(loss / len(shares), last=number == len(shares))
            losses.append(loss.detach())
    with watch.phase("update"):
        norm = session.engine.step()
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


class SFT(loop.Trainer):
    """The warm start; the last held-out losses are `after`."""

    keys = MATCHING
    check_world = staticmethod(check_sft_world)
    check_inputs = staticmethod(check_clips)

    def __init__(self, config: SftConfig, mesh: Mesh, inputs: Any, heartbeat: Heartbeat) -> None:
        self.session, self.heartbeat = build_sft_session(config, mesh, *inputs), heartbeat
        self.progress = SftProgress()
        self.after: HeldoutLosses | None = None

    def begin(self) -> None:
        before = heldout_losses(self.session)
        self.progress.heldout_before = [] if before is None else before.mean(dim=1).tolist()

    def train_step(self, step: int) -> dict[str, float]:
        return train_step(self.session, step, self.heartbeat)

    def evaluate(self, step: int, last: bool, log: RunLog) -> dict[str, float]:
        self.after = heldout_losses(self.session)
        return {} if self.after is None else heldout_metrics(self.session, self.after)

    def finish(self) -> dict[str, Any]:
        after = heldout_losses(self.session) if self.after is None else self.after
        summary = summarise(self.session, self.progress, after)
        if self.session.mesh.is_main:
            write_results(self.session, summary)
        return summary


def train(config: SftConfig) -> dict[str, Any] | None:
    """`loop.train` of this kind."""
    return loop.train(config, SFT)


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
        "seconds": {"total": round(progress.seconds["total"], 3)},
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


def write_results(session: SftSession, summary: dict[str, Any]) -> None:
    """summary.json, and on the screen a table and the paths of what the run left."""
    run_dir = Path(session.config.run.dir)
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
