"""What ZeRO keeps on a rank, as DeepSpeed 0.19 lays it out, in the parts of a memory plan.

    stage   weights   masters, moments   gradients during the backward
    1       whole     a share            whole, and a bucket
    2       whole     a share            a share so far, a new share, and a bucket
    3       a share   a share            a share, and a bucket: both from the start to the end of a run

Masters, gradients and AdamW's two moments are fp32 in every stage and precision. During a pass stage 3 also holds the
whole weights of blocks that are used next or soon again. `tests/distributed/test_memory.py` compares this with what
DeepSpeed allocates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.engine import zero_settings
from bpgo_video.distributed.gathering import GATHERED_AT_ONCE
from bpgo_video.planning.footprint import Weights

FP32 = 4  # bytes

PHASES = ("gather", "denoise", "decode", "replay", "update")  # of a training step
ROLLOUT = ("denoise", "decode")

Parts = dict[str, int]  # name -> bytes of a rank


@dataclass(frozen=True)
class Part:
    """Bytes of a rank, on its GPU during some phases or in its host's memory."""

    name: str
    size: int
    phases: tuple[str, ...] = PHASES
    on_host: bool = False


def on_gpu(parts: Iterable[Part], phase: str) -> Parts:
    """The bytes by name that a rank's GPU holds during a phase."""
    return sums(part for part in parts if phase in part.phases and not part.on_host)


def sums(parts: Iterable[Part]) -> Parts:
    """Sums by name, without zeros."""
    total: Parts = {}
    for part in parts:
        if part.size:
            total[part.name] = total.get(part.name, 0) + part.size
    return total


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's settings that memory depends on.

    Attributes:
        settings: ZeRO's, with DeepSpeed's defaults.
        ranks: of the whole world: sequence groups shard over all of them, too.
        weight_bytes: of one element of the model; gradients are fp32.
    """

    settings: Any
    ranks: int
    weight_bytes: int

    @classmethod
    def of(cls, ds_config: Mapping[str, Any], ranks: int) -> Zero:
        return cls(zero_settings(ds_config), ranks, compute_dtype(ds_config).itemsize)

    @property
    def stage(self) -> int:
        return int(self.settings.stage)

    @property
    def bucket(self) -> int:
        """Bytes of one bucket of gradients."""
        return FP32 * self.settings.reduce_bucket_size if self.settings.contiguous_gradients else 0

    def on_host(self, part: str) -> bool:
        """Whether `offload_optimizer` or `offload_param` is set."""
        offload = getattr(self.settings, part)
        return offload is not None and offload.device != "none"

    def share(self, elements: int) -> int:
        return -(-elements // self.ranks)


def zero_at_rest(zero: Zero, weights: Weights, config: Config, reference: bool = False) -> list[Part]:
    """What an engine holds in every phase.

    Args:
        reference: a frozen copy of the starting policy is held, too.
    """
    settings, share = zero.settings, zero.share(sum(weights.trained)) * FP32
    host_weights, host_optimizer = zero.on_host("offload_param"), zero.on_host("offload_optimizer")
    resting = (zero.share(weights.elements) if zero.stage == 3 else weights.elements) * zero.weight_bytes
    parts = [Part("weights", resting, on_host=host_weights)]
    if zero.stage == 3:
        always_whole, hpz = settings.param_persistence_threshold, settings.zero_hpz_partition_size
        small = sum(size for size in (*weights.trained, *weights.frozen) if size <= always_whole)
        secondary = weights.elements // hpz if hpz > 1 else 0  # a node's copy
        parts.append(Part("weights", (small + secondary) * zero.weight_bytes))
        parts.append(Part("gradients", share, on_host=host_optimizer))
        parts.append(Part("gradient bucket", zero.bucket))
    return [
        *parts,
        Part("fp32 weights", share, on_host=host_optimizer),
        Part("optimizer", share * (2 if config.optim.name == "adamw" else 0), on_host=host_optimizer),
        Part("average", share * config.averages, on_host=host_optimizer),
        Part("checkpoint", _copy_bytes(zero, weights, config), on_host=True),
        Part("reference", resting if reference else 0, on_host=host_weights),
    ]


def _copy_bytes(zero: Zero, weights: Weights, config: Config) -> int:
    """The copy that rank 0's part of a checkpoint is written from; weights under ZeRO 1 and 2 are rank 0's."""
    if not config.run.save_async:
        return 0
    whole = 0 if zero.stage == 3 else sum(weights.trained) * zero.weight_bytes
    return zero.share(_stored_numbers(config) * FP32 * sum(weights.trained)) + whole


def checkpoint_bytes(zero: Zero, weights: Weights, config: Config) -> int:
    """A checkpoint's files of all ranks: fp32 weights, moments, average; ZeRO 1 and 2 also store computing weights."""
    each = _stored_numbers(config) * FP32 + (0 if zero.stage == 3 else zero.weight_bytes)
    return each * sum(weights.trained)


def _stored_numbers(config: Config) -> int:
    """Of each trained weight: itself, AdamW's moments, the averages."""
    return 1 + (2 if config.optim.name == "adamw" else 0) + config.averages


def zero_at_work(
    zero: Zero, weights: Weights, config: Config, *, gathers: bool = False, keeps: float = 0.0
) -> list[Part]:
    """What an engine holds in single phases.

    An update takes fp32 gradients and two copies of AdamW's denominators; stage 3 goes by sub-groups.

    Args:
        gathers: rollouts hold all weights on every rank.
        keeps: share of the blocks that keep their activations, and with them their weights once fetched, since
            autograd saves them as views.
    """
    trained, settings = sum(weights.trained), zero.settings
    share = zero.share(trained)
    at_once = min(share, settings.sub_group_size) if zero.stage == 3 else share
    copies = 0 if zero.on_host("offload_optimizer") else 3 if config.optim.name == "adamw" else 1
    update = Part("update", copies * at_once * FP32, ("update",))
    if zero.stage < 3:
        gradients = {1: trained, 2: 2 * share}[zero.stage] * FP32
        buckets = (1 + bool(settings.overlap_comm)) * zero.bucket
        return [Part("gradients", gradients, ("replay",)), Part("gradient bucket", buckets, ("replay",)), update]
    reused = max(settings.max_live_parameters, settings.max_reuse_distance) + weights.largest_block
    live = min(weights.elements, reused) * zero.weight_bytes
    missing = missing_weights(zero, weights)
    kept = min(int(keeps * weights.elements) * zero.weight_bytes + live, weights.elements * zero.weight_bytes)
    replayed = missing if config.optim.parameters == "gathered" else kept  # `auto` takes only what is free
    return [
        Part("weights fetched", missing, ("gather",)),
        Part("weights on their way", min(weights.elements, GATHERED_AT_ONCE) * zero.weight_bytes, ("gather",)),
        Part("weights fetched", missing if gathers else live, ROLLOUT),
        Part("weights fetched", replayed, ("replay",)),
        Part("gradients", trained * FP32 if config.optim.average == "update" else 0, ("replay",)),
        update,
    ]


def missing_weights(zero: Zero, weights: Weights) -> int:
    """Bytes of the weights that a rank does not hold: what gathering them for a rollout takes."""
    return (weights.elements - zero.share(weights.elements)) * zero.weight_bytes if zero.stage == 3 else 0
