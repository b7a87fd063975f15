"""Supervised fine-tuning: flow matching on video clips with captions, evaluated by the loss on held-out clips.

One step is one update: |v - (noise - data)|^2 over `sft.batch_size` clips, which the ranks share. Noise,
noise level and caption dropout depend on seed, step and clip only, so every number of ranks takes the same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.atomic import write_json
from bpgo_video.config.sft import SftConfig, check_sft_world
from bpgo_video.data.clip_build import clip_stamp
from bpgo_video.data.prompt_order import EndlessOrder
from bpgo_video.data.prompt_records import LATENTS, ShardError
from bpgo_video.data.prompt_stream import as_batch, order_of
from bpgo_video.data.shards import PromptShards
from bpgo_video.diffusion.flow_matching import LevelDistribution
from bpgo_video.distributed.agreement import all_or_none, same_everywhere
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.paths import resolve_folder
from bpgo_video.policies import Policy, family
from bpgo_video.policies.transformers import trained_names
from bpgo_video.rollouts.conditioning import cast, for_each
from bpgo_video.rollouts.forward_process import ClipBatch, ClipLoss
from bpgo_video.training import loop
from bpgo_video.training.metrics import MATCHING, RunLog, reduce_metrics
from bpgo_video.training.session import (
    PolicySession,
    build_ema,
    build_engine,
    builder,
    read_common_inputs,
    run_identity,
    sampling_policy,
    spread_rows,
)
from bpgo_video.training.summary import boxed, listed
from bpgo_video.types import Conditioning

SCHEDULE_POINTS = 1000  # of the family's schedule, between which noise levels are interpolated
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


@dataclass(frozen=True)
class SftSession(PolicySession):
    """The parts of supervised fine-tuning."""

    config: SftConfig
    clips: ClipReader
    loss: ClipLoss


def check_sft_inputs(config: SftConfig, mesh: Mesh) -> tuple[dict[str, Any], PromptShards]:
    """As `check_inputs`, for supervised fine-tuning."""
    with all_or_none(mesh):
        ds_config, shards = read_common_inputs(config)
        check_clips(config, shards)
        identity = run_identity(config, ds_config, shards)
    same_everywhere(identity, mesh)
    return ds_config, shards


def check_clips(config: SftConfig, shards: PromptShards) -> None:
    """Check that the shards hold clips of the recipe's video size, encoded by this policy's VAE, in its splits.

    Raises:
        ShardError: names the difference and the command to run.
    """
    shards.require_clips()
    folder = resolve_folder(config.policy.folder)
    takes_images = family(folder, config.policy.family).takes_images
    expected = clip_stamp(folder, config.video, takes_images)["video"]
    differing = [name for name in expected if shards.video.get(name) != expected[name]]
    if differing:
        differences = "; ".join(f"{name} {shards.video.get(name)!r}, here {expected[name]!r}" for name in differing)
        raise ShardError(
            f"{shards.directory} holds clips of another video or VAE ({differences}): set the recipe's `video`, or "
            "build shards for it with bpgo-video videos build"
        )
    if takes_images != (set(shards.clip) != {LATENTS}):
        raise ShardError(
            f"{shards.directory} holds {sorted(shards.clip)} of each clip, but {config.policy.folder} makes videos of "
            f"{'images' if takes_images else 'texts alone'}: build shards for it with bpgo-video videos build"
        )
    order_of(shards, config.data.split, config.run.seed, config.sft.batch_size)
    if config.evaluation.split is not None:
        shards.rows(config.evaluation.split)


def build_sft_session(config: SftConfig, mesh: Mesh, ds_config: Mapping[str, Any], shards: PromptShards) -> SftSession:
    """Build policy and engine; call it after `check_sft_inputs`."""
    policy = sampling_policy(config, ds_config, mesh, builder(ds_config), components=("transformer",))
    engine = build_engine(config, policy, ds_config, mesh)
    clips = ClipReader(
        shards,
        order_of(shards, config.data.split, config.run.seed, config.sft.batch_size),
        spread_rows(shards, config.evaluation.split, config.evaluation.max_clips),
        engine.dtype,
        mesh.device,
        policy.video_conditioning(config.video),
    )
    loss = clip_loss(config, policy, shards, engine.dtype, mesh.device)
    return SftSession(config, mesh, policy, engine, build_ema(config, engine), clips, loss)


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
    check_world = staticmethod(check_sft_world)
    check_inputs = staticmethod(check_sft_inputs)

    def __init__(self, config: SftConfig, mesh: Mesh, inputs: Any, heartbeat: Heartbeat) -> None:
        self.session, self.heartbeat = build_sft_session(config, mesh, *inputs), heartbeat
        self.progress = SftProgress()
        self.after: HeldoutLosses | None = None

    def begin(self) -> None:
        before = self.heldout_losses()
        self.progress.heldout_before = [] if before is None else before.mean(dim=1).tolist()

    def train_step(self, step: int) -> dict[str, float]:
        session, sft, watch = self.session, self.session.config.sft, loop.Stopwatch(self.heartbeat, step)
        transformer, learning_rate = session.loss.transformer_of(step), session.engine.learning_rate
        shares, losses = session.mesh.share(sft.batch_size, sft.micro_batch_size), []
        for number, positions in enumerate(shares, start=1):
            with watch.phase("data"):
                rows = [session.clips.order.row(step * sft.batch_size + position) for position in positions]
                clips = session.clips.read(rows)
            with watch.phase("update"):
                loss = session.loss.errors(clips, step, transformer).mean()
                session.engine.backward(loss / len(shares), last=number == len(shares))
                losses.append(loss.detach())
        with watch.phase("update"):
            norm = session.engine.step()
        metrics = reduce_metrics({"loss": torch.stack(losses).mean(), "grad_norm": norm})
        return {**metrics, "learning_rate": learning_rate, **watch.record}

    def evaluate(self, step: int, last: bool, log: RunLog) -> dict[str, float]:
        self.after = self.heldout_losses()
        if self.after is None:
            return {}
        levels = self.session.loss.heldout_levels(self.after.shape[1])
        by_level = zip(levels.tolist(), self.after.mean(dim=0).tolist(), strict=True)
        return {
            "heldout/loss": float(self.after.mean()),
            **{f"heldout/loss_at_{sigma:.3f}": loss for sigma, loss in by_level},
        }

    def finish(self) -> dict[str, Any]:
        after = self.heldout_losses() if self.after is None else self.after
        summary = summarise(self.session, self.progress, after)
        if self.session.mesh.is_main:
            write_results(self.session, summary)
        return summary

    def heldout_losses(self) -> HeldoutLosses | None:
        """The loss of each held-out clip at `evaluation.levels` noise levels, the same on every rank.

        Noise is keyed by seed, clip and level. None if no split is held out.
        """
        session, evaluation = self.session, self.session.config.evaluation
        rows, count = session.clips.heldout, len(session.clips.heldout)
        if not count:
            return None
        shares = session.mesh.share(count, session.config.sft.micro_batch_size)
        levels = session.loss.heldout_levels(evaluation.levels)
        with session.weights(evaluation.weights):
            losses = [session.loss.errors_at(session.clips.read(rows[items].tolist()), levels) for items in shares]
        items = [item for share in shares for item in share]
        return session.mesh.gather(torch.cat(losses), items, count).cpu()


train = partial(loop.train, kind=SFT)


def summarise(session: SftSession, progress: SftProgress, after: HeldoutLosses | None) -> dict[str, Any]:
    """The fields of summary.json; held-out losses are means over clips and levels."""
    config = session.config
    clips = progress.step * config.sft.batch_size
    summary: dict[str, Any] = {
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
        return summary
    before = torch.tensor(progress.heldout_before)
    change = after.mean(dim=1) - before
    return summary | {
        "heldout_loss_before": float(before.mean()),
        "heldout_loss_after": float(after.mean()),
        "heldout_loss_difference_stderr": float(change.std() / len(change) ** 0.5) if len(change) > 1 else None,
        "heldout_clips": len(change),
    }


def write_results(session: SftSession, summary: dict[str, Any]) -> None:
    """Write summary.json; print a table and the paths of the run's files."""
    run_dir = Path(session.config.run.dir)
    write_json(run_dir / "summary.json", summary)
    formats = {
        "heldout_loss_before": "{:.4f}",
        "heldout_loss_after": "{:.4f}",
        "steps": "{:,}",
        "clips": "{:,}",
        "epochs": "{:.2f}",
    }
    rows = [(key.replace("_", " "), form.format(summary[key])) for key, form in formats.items() if key in summary]
    names = ["summary.json", "metrics.jsonl", "config.yaml", "checkpoints", "export"]
    names += ["export-ema"] if session.ema else []
    print("\n".join([boxed(rows), *listed({name: run_dir / name for name in names})]))
