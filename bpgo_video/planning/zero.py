"""What does ZeRO keep on a rank? Arithmetic over parameters, stage and ranks, as DeepSpeed 0.19 lays them out.

    stage   weights   masters, moments   gradients between passes
    1       whole     a share            whole
    2       whole     a share            a share, and one bucket on the way
    3       a share   a share            a share, and one bucket on the way

Masters and AdamW's two moments are fp32 in every stage, also where the model computes in fp32. During a pass stage 3 also
holds the whole weights of the blocks that are used next or soon again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bpgo_video.config import Config
from bpgo_video.engine import compute_dtype, zero_settings
from bpgo_video.planning.rehearsal import Footprint

FP32 = 4
GRADIENT_DTYPES = {"fp32": FP32, "fp16": 2, "bf16": 2}
Parts = dict[str, int]  # what it is -> bytes of a rank


@dataclass(frozen=True)
class Zero:
    """The settings of DeepSpeed that memory depends on.

    Attributes:
        ranks: of the whole world: sequence groups shard over all of them, too.
        weight_bytes, gradient_bytes: of one element.
        live: elements of whole weights that stage 3 keeps beside the block at work.
    """

    stage: int
    ranks: int
    weight_bytes: int
    gradient_bytes: int
    bucket: int
    two_buckets: bool
    live: int
    sub_group: int
    persistence: int
    secondary: int
    optimizer_on_host: bool
    weights_on_host: bool

    @classmethod
    def of(cls, ds_config: Mapping[str, Any], ranks: int) -> Zero:
        settings = zero_settings(ds_config)
        weight_bytes = compute_dtype(ds_config).itemsize
        gradients = ds_config.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            stage=int(settings.stage),
            ranks=ranks,
            weight_bytes=weight_bytes,
            gradient_bytes=GRADIENT_DTYPES[gradients] if gradients else weight_bytes,
            bucket=settings.reduce_bucket_size if settings.contiguous_gradients else 0,
            two_buckets=bool(settings.overlap_comm) and settings.stage != 3,
            live=max(settings.max_live_parameters, settings.max_reuse_distance),
            sub_group=settings.sub_group_size,
            persistence=settings.param_persistence_threshold,
            secondary=settings.zero_hpz_partition_size,
            optimizer_on_host=_on_host(settings.offload_optimizer),
            weights_on_host=_on_host(settings.offload_param),
        )

    def share(self, elements: int) -> int:
        return -(-elements // self.ranks)


def _on_host(offload: Any) -> bool:
    return offload is not None and offload.device != "none"


@dataclass(frozen=True)
class Held:
    """What a rank holds, on its GPU and in its host's memory."""

    device: Parts = field(default_factory=dict)
    host: Parts = field(default_factory=dict)

    def add(self, name: str, size: int, on_host: bool = False) -> None:
        if size:
            parts = self.host if on_host else self.device
            parts[name] = parts.get(name, 0) + size


def at_rest(zero: Zero, module: Footprint, config: Config) -> Held:
    """What one trained module keeps for the length of a run."""
    held = Held()
    trained = zero.share(module.trained)
    whole = module.parameters * zero.weight_bytes
    if zero.stage == 3:
        small = sum(size for size in module.sizes if size <= zero.persistence) * zero.weight_bytes
        held.add("weights", whole // zero.ranks, zero.weights_on_host)
        held.add("weights", small + (whole // zero.secondary if zero.secondary > 1 else 0))
        held.add("gradients", trained * zero.gradient_bytes, zero.optimizer_on_host)
        held.add("gradient buckets", zero.bucket * zero.weight_bytes)
    else:
        held.add("weights", whole)
    held.add("fp32 weights", trained * FP32, zero.optimizer_on_host)
    held.add("optimiser", trained * FP32 * (2 if config.optim.name == "adamw" else 0), zero.optimizer_on_host)
    held.add("average", trained * FP32 if config.ema.decay else 0, zero.optimizer_on_host)
    return held


def untrained(zero: Zero, module: Footprint) -> Held:
    """What a module that is used and never trained keeps: a reference, or an expert that stays as it is."""
    held = Held()
    whole = module.parameters * zero.weight_bytes
    held.add("frozen weights", whole // zero.ranks if zero.stage == 3 else whole)
    return held


def live_weights(zero: Zero, module: Footprint) -> int:
    """Bytes of whole weights during a pass under stage 3, where not all are gathered for its length."""
    if zero.stage != 3:
        return 0
    elements = min(module.parameters, zero.live + module.largest_block)
    return elements * zero.weight_bytes


def missing_weights(zero: Zero, module: Footprint) -> int:
    """Bytes that a rank lacks of the whole weights: what gathering them for a rollout takes."""
    return (module.parameters - zero.share(module.parameters)) * zero.weight_bytes if zero.stage == 3 else 0


def during_backward(zero: Zero, module: Footprint) -> Parts:
    """What gradients take beside what is at rest, while they come."""
    if zero.stage == 3:
        return {}
    kept = module.trained if zero.stage == 1 else zero.share(module.trained)
    buckets = zero.bucket * (2 if zero.two_buckets else 1)
    return {
        "gradients": kept * zero.gradient_bytes,
        "gradient buckets": buckets * zero.weight_bytes,
    }


def during_step(zero: Zero, module: Footprint) -> Parts:
    """What an update takes: gradients in fp32, and AdamW's denominators; stage 3 goes by sub-groups."""
    if zero.optimizer_on_host:
        return {}
    elements = zero.share(module.trained)
    at_once = min(elements, zero.sub_group) if zero.stage == 3 else elements
    return {"update": 2 * at_once * FP32}
