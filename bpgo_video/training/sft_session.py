"""What does a warm start stand on? Video shards that fit the policy, checked first; the policy under its engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bpgo_video.config.sft import SftConfig
from bpgo_video.data.encoding import clip_stamp
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import LATENTS, PromptRecord, ShardError
from bpgo_video.data.stream import EndlessOrder, as_batch
from bpgo_video.diffusion.flow_matching import Chances
from bpgo_video.distributed.agreement import all_or_none, same_everywhere
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.paths import resolve_folder
from bpgo_video.policies import Policy, family
from bpgo_video.policies.networks import trained_names
from bpgo_video.rollouts.clip_loss import ClipBatch, ClipLoss
from bpgo_video.rollouts.conditioning import cast, for_each
from bpgo_video.training.policy_session import (
    PolicySession,
    averaged,
    build_engine,
    builder,
    identity,
    read_foundations,
    sampling_policy,
)
from bpgo_video.types import Conditioning

GRID = 1000  # of the family's schedule, on which drawn levels are placed


@dataclass(frozen=True)
class Clips:
    """What is read of the shards.

    Attributes:
        order: in which clips are learned from.
        heldout: rows of the clips whose loss is measured.
        told: what the policy is told of the clips' size and speed, one row.
    """

    shards: PromptShards
    order: EndlessOrder
    heldout: np.ndarray
    dtype: torch.dtype
    device: torch.device
    told: Conditioning = field(default_factory=dict)

    def read(self, rows: Sequence[int]) -> ClipBatch:
        """The clips of these rows."""
        records = [self.shards.record(row) for row in rows]
        texts = as_batch(records).conditioning
        own = {name: _stack(records, name) for name in self.shards.clip}
        latents = own.pop(LATENTS).to(self.device, torch.float32)
        told = for_each(cast(self.told, torch.float32, self.device), len(records))
        conditioning = {**cast({**texts, **own}, self.dtype, self.device), **told}
        return ClipBatch([r.id for r in records], latents, conditioning)


def _stack(records: Sequence[PromptRecord], name: str) -> Tensor:
    return torch.stack([record.clip[name] for record in records])


@dataclass(frozen=True)
class SftSession(PolicySession):
    """The parts of a warm start, built and ready."""

    config: SftConfig
    clips: Clips
    loss: ClipLoss


def check_clips(config: SftConfig, mesh: Mesh) -> tuple[dict[str, Any], PromptShards]:
    """Everything that can be wrong before a model is loaded, on any rank; that all ranks read the same.

    Raises:
        ConfigError, ShardError, FileNotFoundError: state the value, the rule and the way out.
    """
    with all_or_none(mesh):
        ds_config, shards = read_foundations(config)
        check_fit(config, shards)
        stands_on = identity(config, ds_config, shards)
    same_everywhere(stands_on, mesh)
    return ds_config, shards


def check_fit(config: SftConfig, shards: PromptShards) -> None:
    """Whether the shards hold clips of the recipe's size, encoded by this policy's VAE, in the splits that it names.

    Raises:
        ShardError: names what differs, and the tool.
    """
    shards.require_clips()
    folder = resolve_folder(config.policy.folder)
    takes_images = family(folder, config.policy.family).takes_images
    expected = clip_stamp(folder, config.video, takes_images)["video"]
    differing = [name for name in expected if shards.video.get(name) != expected[name]]
    if differing:
        told = "; ".join(f"{name} {shards.video.get(name)!r}, here {expected[name]!r}" for name in differing)
        raise ShardError(
            f"{shards.directory} holds clips of another video or VAE ({told}): set the recipe's `video`, or build "
            "shards for it with bpgo-video videos build"
        )
    if takes_images != (set(shards.clip) != {LATENTS}):
        raise ShardError(
            f"{shards.directory} holds {sorted(shards.clip)} of each clip, but {config.policy.folder} makes videos of "
            f"{'images' if takes_images else 'texts alone'}: build shards for it with bpgo-video videos build"
        )
    EndlessOrder(shards, config.data.split, config.run.seed, config.sft.batch_size)
    if config.evaluation.split is not None:
        shards.rows(config.evaluation.split)


def heldout_rows(config: SftConfig, shards: PromptShards) -> np.ndarray:
    """Rows of the held-out split, at most `evaluation.max_clips`, evenly spread over it; none where it is not named."""
    if config.evaluation.split is None:
        return np.empty(0, dtype=np.int64)
    rows = shards.rows(config.evaluation.split)
    count = min(len(rows), config.evaluation.max_clips)
    return rows[np.arange(count) * len(rows) // count]


def build_sft_session(config: SftConfig, mesh: Mesh, ds_config: Mapping[str, Any], shards: PromptShards) -> SftSession:
    """Policy (sharded from birth under ZeRO-3) and engine, once `check_clips` has passed."""
    policy = sampling_policy(config, ds_config, mesh, builder(ds_config), components=("transformer",))
    engine = build_engine(config, policy, ds_config, mesh)
    return SftSession(
        config=config,
        mesh=mesh,
        policy=policy,
        engine=engine,
        ema=averaged(config, engine),
        clips=Clips(
            shards,
            EndlessOrder(shards, config.data.split, config.run.seed, config.sft.batch_size),
            heldout_rows(config, shards),
            engine.dtype,
            mesh.device,
            policy.video_conditioning(config.video),
        ),
        loss=clip_loss(config, policy, shards, engine.dtype, mesh),
    )


def clip_loss(config: SftConfig, policy: Policy, shards: PromptShards, dtype: torch.dtype, mesh: Mesh) -> ClipLoss:
    """The recipe's loss of a policy that computes in `dtype`."""
    sft = config.sft
    return ClipLoss(
        policy=policy,
        negative=cast(shards.negative, dtype, mesh.device),
        chances=Chances(sft.density, sft.density_mean, sft.density_std, sft.caption_dropout),
        schedule=policy.sigmas(GRID, config.video, sft.shift),
        trained=trained_names(policy.folder, config.policy.trained),
        seed=config.run.seed,
    )
