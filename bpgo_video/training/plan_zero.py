"""What does ZeRO keep on a rank? Arithmetic over parameters, stage and ranks, as DeepSpeed 0.19 lays them out.

    stage   weights   masters, moments   gradients while they come
    1       whole     a share            whole, and a bucket
    2       whole     a share            a share so far, a new share, and a bucket
    3       a share   a share            a share, and a bucket: both from the start to the end of a run

Masters, gradients and AdamW's two moments are fp32 in every stage and precision. During a pass stage 3 also holds the
whole weights of the blocks that are used next or soon again. `tests/distributed/test_memory.py` compares this with what
DeepSpeed allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.engine import GATHERED_AT_ONCE, zero_settings

FP32 = 4
Parts = dict[str, int]  # what it is -> bytes of a rank


@dataclass(frozen=True)
class Weights:
    """What an engine shards.

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
    """The settings of DeepSpeed that memory depends on.

    Attributes:
        ranks: of the whole world: sequence groups shard over all of them, too.
        weight_bytes: of one element of the model; gradients are fp32.
        live: elements of whole weights that stage 3 keeps beside the block at work.
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
            optimizer_on_host=_on_host(settings.offload_optimizer),
            weights_on_host=_on_host(settings.offload_param),
        )

    def share(self, elements: int) -> int:
        return -(-elements // self.ranks)


def _on_host(offload: Any) -> bool:
    return offload is not None and offload.device != "none"


class Held:
    """What a rank holds, on its GPU and in its host's memory."""

    def __init__(self) -> None:
        self.device: Parts = {}
        self.host: Parts = {}

    def add(self, name: str, size: int, on_host: bool = False) -> None:
        parts = self.host if on_host else self.device
        parts[name] = parts.get(name, 0) + size


def add_at_rest(held: Held, zero: Zero, weights: Weights, config: Config) -> None:
    """What an engine keeps for the length of a run."""
    trained = zero.share(sum(weights.trained))
    held.add("weights", _resting_weights(zero, weights), zero.weights_on_host)
    if zero.stage == 3:
        held.add("weights", _kept_whole(zero, weights))
        held.add("gradients", trained * FP32, zero.optimizer_on_host)
        held.add("gradient bucket", zero.bucket * FP32)
    held.add("fp32 weights", trained * FP32, zero.optimizer_on_host)
    held.add("optimiser", trained * FP32 * (2 if config.optim.name == "adamw" else 0), zero.optimizer_on_host)
    held.add("average", trained * FP32 if config.ema.decay else 0, zero.optimizer_on_host)


def add_reference(held: Held, zero: Zero, weights: Weights) -> None:
    """A frozen copy of the starting policy."""
    held.add("reference", _resting_weights(zero, weights), zero.weights_on_host)


def _resting_weights(zero: Zero, weights: Weights) -> int:
    return (zero.share(weights.elements) if zero.stage == 3 else weights.elements) * zero.weight_bytes


def _kept_whole(zero: Zero, weights: Weights) -> int:
    """Bytes of stage 3's small parameters, and of the copy that nodes keep of the others (hpZ)."""
    small = sum(size for size in (*weights.trained, *weights.frozen) if size <= zero.persistence)
    secondary = weights.elements // zero.secondary if zero.secondary > 1 else 0
    return (small + secondary) * zero.weight_bytes


def live_weights(zero: Zero, weights: Weights, held_by_autograd: bool = False) -> int:
    """Bytes of whole weights during a pass under stage 3, where not all are gathered for its length.

    Args:
        held_by_autograd: a forward that keeps its activations keeps the weights with them, once they are fetched: what
            it saves of them are views.
    """
    if zero.stage != 3:
        return 0
    elements = weights.elements if held_by_autograd else zero.live + weights.largest_block
    return min(weights.elements, elements) * zero.weight_bytes


def missing_weights(zero: Zero, weights: Weights) -> int:
    """Bytes that a rank lacks of the whole weights: what gathering them for a rollout takes."""
    return (weights.elements - zero.share(weights.elements)) * zero.weight_bytes if zero.stage == 3 else 0


def on_their_way(zero: Zero, weights: Weights) -> int:
    """Bytes that come together at once while whole weights are gathered, beside what is there already."""
    return min(weights.elements, GATHERED_AT_ONCE) * zero.weight_bytes


def during_backward(zero: Zero, weights: Weights) -> Parts:
    """What gradients take beside what is at rest, while they come."""
    trained = sum(weights.trained)
    kept = {1: trained, 2: 2 * zero.share(trained), 3: 0}[zero.stage]
    buckets = 0 if zero.stage == 3 else zero.buckets
    return {"gradients": kept * FP32, "gradient bucket": buckets * zero.bucket * FP32}


def during_step(zero: Zero, weights: Weights, config: Config) -> Parts:
    """What an update takes: gradients in fp32 and AdamW's denominators, twice while they are made; stage 3 goes by
    sub-groups."""
    elements = zero.share(sum(weights.trained))
    at_once = min(elements, zero.sub_group) if zero.stage == 3 else elements
    copies = 3 if config.optim.name == "adamw" else 1
    return {"update": 0 if zero.optimizer_on_host else copies * at_once * FP32}
