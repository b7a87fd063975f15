"""Memory that ZeRO keeps on a rank: arithmetic over parameters, stage and ranks, as DeepSpeed 0.19 lays them out.

    stage   weights   masters, moments   gradients during the backward
    1       whole     a share            whole, and a bucket
    2       whole     a share            a share so far, a new share, and a bucket
    3       a share   a share            a share, and a bucket: both from the start to the end of a run

Masters, gradients and AdamW's two moments are fp32 in every stage and precision. During a pass stage 3 also holds the
whole weights of blocks that are used next or soon again. `tests/distributed/test_memory.py` compares this with what
DeepSpeed allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.engine import GATHERED_AT_ONCE, zero_settings

FP32 = 4  # bytes
Parts = dict[str, int]  # name -> bytes of a rank


@dataclass(frozen=True)
class Weights:
    """The parameters that an engine shards.

    Attributes:
        trained, frozen: elements of each parameter.
        largest_block: elements of the largest unit that stage 3 fetches at once.
    """

    trained: tuple[int, ...]
    frozen: tuple[int, ...]
    largest_block: int

    @property
    def elements(self) -> int:
        return sum(self.trained) + sum(self.frozen)


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's settings that memory depends on.

    Attributes:
        ranks: of the whole world: sequence groups shard over all of them, too.
        weight_bytes: of one element of the model; gradients are fp32.
        live: elements of whole weights that stage 3 keeps besides the current block.
    """

    stage: int
    ranks: int
    weight_bytes: int
    bucket: int
    buckets: int
    live: int
    sub_group: int
    persistence: int
    secondary: int
    optimizer_on_host: bool
    weights_on_host: bool

    @classmethod
    def of(cls, ds_config: Mapping[str, Any], ranks: int) -> Zero:
        settings = zero_settings(ds_config)
        optimizer, weights = settings.offload_optimizer, settings.offload_param
        return cls(
            stage=int(settings.stage),
            ranks=ranks,
            weight_bytes=compute_dtype(ds_config).itemsize,
            bucket=settings.reduce_bucket_size if settings.contiguous_gradients else 0,
            buckets=2 if settings.overlap_comm and settings.stage < 3 else 1,
            live=max(settings.max_live_parameters, settings.max_reuse_distance),
            sub_group=settings.sub_group_size,
            persistence=settings.param_persistence_threshold,
            secondary=settings.zero_hpz_partition_size,
            optimizer_on_host=optimizer is not None and optimizer.device != "none",
            weights_on_host=weights is not None and weights.device != "none",
        )

    def share(self, elements: int) -> int:
        return -(-elements // self.ranks)


@dataclass
class Held:
    """Bytes that a rank holds, on its GPU and in its host's memory."""

    device: Parts = field(default_factory=dict)
    host: Parts = field(default_factory=dict)

    def add(self, name: str, size: int, on_host: bool = False) -> None:
        parts = self.host if on_host else self.device
        parts[name] = parts.get(name, 0) + size


def held_at_rest(zero: Zero, weights: Weights, config: Config, reference: bool = False) -> Held:
    """What an engine holds in every phase.

    Args:
        reference: a frozen copy of the starting policy is held, too.
    """
    held, trained = Held(), zero.share(sum(weights.trained))
    resting = (zero.share(weights.elements) if zero.stage == 3 else weights.elements) * zero.weight_bytes
    held.add("weights", resting, zero.weights_on_host)
    if zero.stage == 3:
        small = sum(size for size in (*weights.trained, *weights.frozen) if size <= zero.persistence)  # always whole
        secondary = weights.elements // zero.secondary if zero.secondary > 1 else 0  # a node's copy (hpZ)
        held.add("weights", (small + secondary) * zero.weight_bytes)
        held.add("gradients", trained * FP32, zero.optimizer_on_host)
        held.add("gradient bucket", zero.bucket * FP32)
    held.add("fp32 weights", trained * FP32, zero.optimizer_on_host)
    held.add("optimiser", trained * FP32 * (2 if config.optim.name == "adamw" else 0), zero.optimizer_on_host)
    held.add("average", trained * FP32 if config.ema.decay else 0, zero.optimizer_on_host)
    if reference:
        held.add("reference", resting, zero.weights_on_host)
    return held


def live_weights(zero: Zero, weights: Weights, held_by_autograd: bool = False) -> int:
    """Bytes of whole weights during a pass under stage 3, if they are not all gathered.

    Args:
        held_by_autograd: activations are kept, and with them all weights once fetched, since they are saved as views.
    """
    if zero.stage != 3:
        return 0
    elements = weights.elements if held_by_autograd else zero.live + weights.largest_block
    return min(weights.elements, elements) * zero.weight_bytes


def missing_weights(zero: Zero, weights: Weights) -> int:
    """Bytes of the weights that a rank does not hold: what gathering them for a rollout takes."""
    return (weights.elements - zero.share(weights.elements)) * zero.weight_bytes if zero.stage == 3 else 0


def gather_buffer(zero: Zero, weights: Weights) -> int:
    """Bytes that are received at once while weights are gathered, besides the gathered weights."""
    return min(weights.elements, GATHERED_AT_ONCE) * zero.weight_bytes


def during_backward(zero: Zero, weights: Weights) -> Parts:
    """What gradients take during the backward, besides what is held at rest."""
    trained = sum(weights.trained)
    kept = {1: trained, 2: 2 * zero.share(trained), 3: 0}[zero.stage]
    buckets = 0 if zero.stage == 3 else zero.buckets
    return {"gradients": kept * FP32, "gradient bucket": buckets * zero.bucket * FP32}


def during_step(zero: Zero, weights: Weights, config: Config) -> Parts:
    """What an update takes: fp32 gradients and two copies of AdamW's denominators; stage 3 goes by sub-groups."""
    elements = zero.share(sum(weights.trained))
    at_once = min(elements, zero.sub_group) if zero.stage == 3 else elements
    copies = 3 if config.optim.name == "adamw" else 1
    return {"update": 0 if zero.optimizer_on_host else copies * at_once * FP32}
