"""Supervised fine-tuning: flow matching on video clips with captions, evaluated by the loss on held-out clips.

One step is one update: |v - (noise - data)|^2 over `sft.batch_size` clips, which the ranks share. Noise,
noise level and caption dropout depend on seed, step and clip only, so every number of ranks takes the same step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.sft import SftConfig
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import LATENTS
from bpgo_video.data.stream import EndlessOrder, as_batch
from bpgo_video.diffusion.flow_matching import LevelDistribution
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.files import write_json
from bpgo_video.policies import Policy
from bpgo_video.policies.networks import trained_names
from bpgo_video.rollouts.conditioning import cast, for_each
from bpgo_video.rollouts.forward_process import ClipBatch, ClipLoss
from bpgo_video.training import loop
from bpgo_video.training.inputs import Inputs, spread_rows
from bpgo_video.training.metrics import MATCHING, RunLog, reduce_metrics
from bpgo_video.training.session import PolicySession, build_ema, build_engine, builder, sampling_policy
from bpgo_video.training.summary import boxed, listed
from bpgo_video.types import Conditioning

SCHEDULE_POINTS = 1000  # of the family's schedule, between which noise levels are interpolated
RESULTS = ("summary.json", "metrics.jsonl", "config.yaml", "checkpoints", "export")
SHOWN = {  # fields of summary.json in the table on the screen
    "heldout_loss_before": "{:.4f}",
    "heldout_loss_after": "{:.4f}",
    "steps": "{:,}",
    "clips": "{:,}",
    "epochs": "{:.2f}",
}
HeldoutLosses = Float[Tensor, "clips levels"]


@dataclass
class SftProgress:
    """The run's progress, which checkpoints keep."""

    step: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"total": 0.0})
    heldout_before: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ClipReader:
    """Reads micro-batches of clips.

    Attributes:
        order: of the training clips.
        heldout: rows of the held-out clips.
        video_conditioning: properties of the video that condition the transformer, one row.
    """

    shards: PromptShards
    order: EndlessOrder
    heldout: np.ndarray
    dtype: torch.dtype
    device: torch.device
    video_conditioning: Conditioning = field(default_factory=dict)

    def read(self, rows: Sequence[int]) -> ClipBatch:
        """The clips of these rows: latents in fp32, conditioning in the policy's dtype."""
        records = [self.shards.record(row) for row in rows]
        clips = {name: torch.stack([record.clip[name] for record in records]) for name in self.shards.clip}
        latents = clips.pop(LATENTS).to(self.device, torch.float32)
        of_video = for_each(cast(self.video_conditioning, torch.float32, self.device), len(records))
        conditioning = {**cast({**as_batch(records).conditioning, **clips}, self.dtype, self.device), **of_video}
        return ClipBatch([record.id for record in records], latents, conditioning)


def clip_loss(
    config: SftConfig, policy: Policy, shards: PromptShards, dtype: torch.dtype, device: torch.device
) -> ClipLoss:
    """The recipe's loss; `dtype` is the policy's."""
    sft = config.sft
    return ClipLoss(
        policy=policy,
        negative=cast(shards.negative, dtype, device),
        levels=LevelDistribution(sft.density, sft.density_mean, sft.density_std),
        caption_dropout=sft.caption_dropout,
        schedule=policy.sigmas(SCHEDULE_POINTS, config.video, sft.shift),
        trained=trained_names(policy.folder, config.policy.trained),
        seed=config.run.seed,
    )


class SFT(loop.Trainer):
    """Supervised fine-tuning.

    Attributes:
        after: the last held-out losses.
    """

    keys = MATCHING

    def __init__(self, config: SftConfig, mesh: Mesh, inputs: Inputs, heartbeat: Heartbeat) -> None:
        ds_config, shards = inputs
        policy = sampling_policy(config, ds_config, mesh, builder(ds_config), components=("transformer",))
        engine = build_engine(config, policy, ds_config, mesh)
        self.session = PolicySession(config, mesh, policy, engine, build_ema(config, engine))
        self.config, self.heartbeat, self.progress = config, heartbeat, SftProgress()
        self.clips = ClipReader(
            shards,
            EndlessOrder(shards, config.data.split, config.run.seed, config.sft.batch_size),
            spread_rows(shards, config.evaluation.split, config.evaluation.max_clips),
            engine.dtype,
            mesh.device,
            policy.video_conditioning(config.video),
        )
        self.loss = clip_loss(config, policy, shards, engine.dtype, mesh.device)
        self.after: HeldoutLosses | None = None

    def begin(self) -> None:
        before = self.heldout_losses()
        self.progress.heldout_before = [] if before is None else before.mean(dim=1).tolist()

    def train_step(self, step: int, pause: bool) -> dict[str, float]:
        sft, engine, watch = self.config.sft, self.session.engine, loop.Stopwatch(self.heartbeat, step)
        transformer, learning_rate = self.loss.transformer_of(step), engine.learning_rate
        shares, losses = self.session.mesh.share(sft.batch_size, sft.micro_batch_size), []
        with engine.replaying():
            for number, positions in enumerate(shares, start=1):
                with watch.phase("data"):
                    rows = [self.clips.order.row(step * sft.batch_size + position) for position in positions]
                    clips = self.clips.read(rows)
                with watch.phase("update"):
                    loss = self.loss.errors(clips, step, transformer).mean()
                    engine.backward(loss / len(shares), last=number == len(shares))
                    losses.append(loss.detach())
        with watch.phase("update"):
            norm = engine.step()
        metrics = reduce_metrics({"loss": torch.stack(losses).mean(), "grad_norm": norm})
        skipped = {"updates_skipped": float(not math.isfinite(norm))}
        return {**metrics, **skipped, "learning_rate": learning_rate, **watch.record}

    def evaluate(self, step: int, last: bool, log: RunLog) -> dict[str, float]:
        self.after = self.heldout_losses()
        if self.after is None:
            return {}
        levels = self.loss.heldout_levels(self.after.shape[1])
        by_level = zip(levels.tolist(), self.after.mean(dim=0).tolist(), strict=True)
        return {
            "heldout/loss": float(self.after.mean()),
            **{f"heldout/loss_at_{sigma:.3f}": loss for sigma, loss in by_level},
        }

    def finish(self) -> dict[str, Any]:
        after = self.heldout_losses() if self.after is None else self.after
        summary = self.summary(after)
        if self.session.mesh.is_main:
            self.write_results(summary)
        return summary

    def heldout_losses(self) -> HeldoutLosses | None:
        """The loss of each held-out clip at `evaluation.levels` noise levels, the same on every rank.

        Noise is keyed by seed, clip and level. None if no split is held out.
        """
        mesh, evaluation = self.session.mesh, self.config.evaluation
        rows, count = self.clips.heldout, len(self.clips.heldout)
        if not count:
            return None
        shares = mesh.share(count, self.config.sft.micro_batch_size)
        levels = self.loss.heldout_levels(evaluation.levels)
        with self.session.weights(evaluation.weights):
            losses = [self.loss.errors_at(self.clips.read(rows[items].tolist()), levels) for items in shares]
        items = [item for share in shares for item in share]
        return mesh.gather(torch.cat(losses), items, count).cpu()

    def summary(self, after: HeldoutLosses | None) -> dict[str, Any]:
        """The fields of summary.json; held-out losses are means over clips and levels."""
        config, clips = self.config, self.progress.step * self.config.sft.batch_size
        summary: dict[str, Any] = {
            "algorithm": config.algorithm,
            "steps": self.progress.step,
            "world_size": self.session.mesh.world_size,
            "zero_stage": self.session.engine.stage,
            "seed": config.run.seed,
            "clips": clips,
            "epochs": clips / len(self.clips.shards.rows(config.data.split)),
            "seconds": {"total": round(self.progress.seconds["total"], 3)},
        }
        if after is None:
            return summary
        before = torch.tensor(self.progress.heldout_before)
        change = after.mean(dim=1) - before
        return summary | {
            "heldout_loss_before": float(before.mean()),
            "heldout_loss_after": float(after.mean()),
            "heldout_loss_difference_stderr": float(change.std() / len(change) ** 0.5) if len(change) > 1 else None,
            "heldout_clips": len(change),
        }

    def write_results(self, summary: dict[str, Any]) -> None:
        """Write summary.json; print a table and the paths of the run's files."""
        run_dir = Path(self.config.run.dir)
        write_json(run_dir / "summary.json", summary)
        rows = [(key.replace("_", " "), form.format(summary[key])) for key, form in SHOWN.items() if key in summary]
        names = [*RESULTS, *(["export-ema"] if self.session.ema else [])]
        print("\n".join([boxed(rows), *listed({name: run_dir / name for name in names})]))


train = partial(loop.train, kind=SFT)


train = partial(loop.train, kind=SFT)
