"""Memory plan of a recipe: bytes of a rank in each phase of a training step, and changes that reduce them.

What ZeRO keeps on a rank, as DeepSpeed 0.19 lays it out:

    stage   weights   masters, moments   gradients during the backward
    1       whole     a share            whole, and a bucket
    2       whole     a share            a share so far, a new share, and a bucket
    3       a share   a share            a share, and a bucket: both from the start to the end of a run

Masters, gradients and AdamW's two moments are fp32 in every stage and precision. During a pass stage 3 also holds the
whole weights of blocks that are used next or soon again. `tests/distributed/test_memory.py` compares this with what
DeepSpeed allocates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, prod
from typing import Any

import yaml

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.rules import check_world
from bpgo_video.diffusion.steps import split_updates
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.engine import GATHERED_AT_ONCE, zero_settings
from bpgo_video.distributed.memory import SHARE_FOR_WEIGHTS
from bpgo_video.policies import Policy
from bpgo_video.policies.base import LatentShape
from bpgo_video.rollouts.rollout import LATENTS_DTYPES, pulls_to_previous
from bpgo_video.training.plan_models import Footprint, Model, Weights, decoding_bytes, footprint, policy_of, vae_bytes

FP32 = 4  # bytes
RUNTIME = 2 * 10**9  # CUDA context, NCCL's buffers and cuBLAS's workspaces: an assumption, not measured
FRAGMENTED = 0.05  # share of a GPU's memory that its allocator cannot use: an assumption, not measured
WORTH = 0.99  # of the peak: a change that lowers it by less is not advised

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
    return _sum(part for part in parts if phase in part.phases and not part.on_host)


def _sum(parts: Iterable[Part]) -> Parts:
    """Sums by name, without zeros."""
    sums: Parts = {}
    for part in parts:
        if part.size:
            sums[part.name] = sums.get(part.name, 0) + part.size
    return sums


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
        Part("average", share if config.ema.decay else 0, on_host=host_optimizer),
        Part("checkpoint", _checkpoint_bytes(zero, weights, config), on_host=True),
        Part("reference", resting if reference else 0, on_host=host_weights),
    ]


def _checkpoint_bytes(zero: Zero, weights: Weights, config: Config) -> int:
    """The copy that rank 0's part of a checkpoint is written from.

    Weights, AdamW's moments and average of its share in fp32; under ZeRO 1 and 2 also the weights it computes with.
    """
    if not config.run.save_async:
        return 0
    copies = 1 + (2 if config.optim.name == "adamw" else 0) + (1 if config.ema.decay else 0)
    whole = 0 if zero.stage == 3 else sum(weights.trained) * zero.weight_bytes
    return copies * FP32 * zero.share(sum(weights.trained)) + whole


def zero_at_work(
    zero: Zero, weights: Weights, config: Config, *, gathers: bool = False, keeps_activations: bool = False
) -> list[Part]:
    """What an engine holds in single phases.

    An update takes fp32 gradients and two copies of AdamW's denominators; stage 3 goes by sub-groups.

    Args:
        gathers: rollouts hold all weights on every rank.
        keeps_activations: and with them all weights once fetched, since autograd saves them as views.
    """
    trained, settings = sum(weights.trained), zero.settings
    share = zero.share(trained)
    at_once = min(share, settings.sub_group_size) if zero.stage == 3 else share
    copies = 0 if zero.on_host("offload_optimizer") else 3 if config.optim.name == "adamw" else 1
    update = Part("update", copies * at_once * FP32, ("update",))
    if zero.stage < 3:
        kept = {1: trained, 2: 2 * share}[zero.stage] * FP32
        buckets = (1 + bool(settings.overlap_comm)) * zero.bucket
        return [Part("gradients", kept, ("replay",)), Part("gradient bucket", buckets, ("replay",)), update]
    reused = max(settings.max_live_parameters, settings.max_reuse_distance) + weights.largest_block
    live = min(weights.elements, reused) * zero.weight_bytes
    missing = missing_weights(zero, weights)
    return [
        Part("weights fetched", missing, ("gather",)),
        Part("weights on their way", min(weights.elements, GATHERED_AT_ONCE) * zero.weight_bytes, ("gather",)),
        Part("weights fetched", missing if gathers else live, ROLLOUT),
        Part("weights fetched", weights.elements * zero.weight_bytes if keeps_activations else live, ("replay",)),
        update,
    ]


def missing_weights(zero: Zero, weights: Weights) -> int:
    """Bytes of the weights that a rank does not hold: what gathering them for a rollout takes."""
    return (weights.elements - zero.share(weights.elements)) * zero.weight_bytes if zero.stage == 3 else 0


@dataclass(frozen=True)
class Job:
    """A recipe on a number of GPUs.

    Attributes:
        reward_bytes: of reward models, weights and activations, if they are on the policy's GPUs.
        gigabytes: of one GPU; decides whether `rollout.parameters: auto` gathers.
    """

    config: Config
    ds_config: Mapping[str, Any]
    ranks: int
    model: Model
    reward_bytes: int = 0
    gigabytes: int = 80

    @cached_property
    def zero(self) -> Zero:
        return Zero.of(self.ds_config, self.ranks)

    @cached_property
    def policy(self) -> Policy:
        """The family's policy without networks."""
        return policy_of(self.model, self.config.policy.family, self.config.policy.max_sequence_length)

    @cached_property
    def latents(self) -> LatentShape:
        """The latents that are sampled and recorded."""
        return self.policy.latent_shape(self.config.video)

    @property
    def decoded(self) -> LatentShape:
        """The latents that the VAE decodes: with given frames, without padding."""
        channels, frames, height, width = self.latents
        return channels, frames + self.policy.given_frames - self.policy.padding_frames, height, width

    @property
    def samples(self) -> int:
        """Of a training step on one rank; the ranks of a sequence group make the same."""
        rollout = self.config.rollout
        return rollout.prompts_per_step * rollout.group_size // (self.ranks // self.config.parallel.sequence)

    @property
    def decoded_at_once(self) -> int:
        """Videos that a rank decodes together: a micro-batch's, or its part of a few in a sequence group."""
        micro, sequence = self.config.rollout.micro_batch_size, self.config.parallel.sequence
        return micro * (sequence // gcd(sequence, micro)) // sequence

    @cached_property
    def footprint(self) -> Footprint:
        """Of one of the model's transformers; of several, one computes at a time."""
        policy, sampler = self.config.policy, self.config.sampler
        halves = 2 if max(sampler.guidance_scale, sampler.guidance_scale_2 or 1) > 1 else 1
        return footprint(
            self.policy,
            self.config.video,
            self.config.rollout.micro_batch_size * halves,
            compute_dtype(self.ds_config),
            gradient_checkpointing=policy.gradient_checkpointing,
            lora=policy.lora,
            sequence=self.config.parallel.sequence,
        )

    @cached_property
    def weights(self) -> Weights:
        """Of all transformers; those that are not trained have no adapters."""
        one, names = self.footprint.weights, self.model.transformers
        trained = len(self.config.policy.trained or names)
        published = one.frozen if self.config.policy.lora.rank else one.trained
        frozen = one.frozen * trained + published * (len(names) - trained)
        return Weights(one.trained * trained, frozen, one.largest_block)


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank.

    Attributes:
        phases: of a training step, each with what a rank's GPU holds at its peak.
        host: in the host's memory.
        gathers: rollouts hold all weights on every rank.
    """

    phases: Mapping[str, Parts]
    host: Parts
    gathers: bool

    @property
    def totals(self) -> dict[str, int]:
        return {name: sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def tightest(self) -> str:
        return max(self.totals, key=self.totals.__getitem__)

    @property
    def peak(self) -> int:
        return max(self.totals.values())

    def fits(self, gigabytes: float) -> bool:
        return self.peak <= room(gigabytes)


def room(gigabytes: float) -> int:
    """Bytes of a GPU that tensors can take."""
    return int(gigabytes * 1e9 * (1 - FRAGMENTED)) - RUNTIME


def reckon(job: Job) -> Plan:
    """The plan of a job.

    Raises:
        ConfigError: the batch does not divide over the ranks, the policy cannot make the video, or the heads do not
            divide over the sequence group.
    """
    check_world(job.config, job.ranks)
    config, settings, zero, weights, work = job.config, job.config.policy, job.zero, job.weights, job.footprint
    frozen, rests = vae_bytes(job.policy), settings.frozen_rest_on == "cpu"
    encoder = job.model.image_encoder_parameters * zero.weight_bytes
    reference = bool(config.loss.kl_weight and config.loss.kl_reference == "start" and not settings.lora.rank)
    resting = [
        *zero_at_rest(zero, weights, config, reference),
        Part("VAE and image encoder", frozen + encoder, on_host=rests),
        Part("trajectories", _trajectory_bytes(job), on_host=config.rollout.offload_trajectories),
        Part("reward models", job.reward_bytes),
    ]
    gathers = _gathers(job, sum(on_gpu(resting, "denoise").values()))
    keeps = not settings.gradient_checkpointing
    split = {"tiling": settings.vae_tiling, "slicing": settings.vae_slicing}
    parts = [
        *resting,
        *zero_at_work(zero, weights, config, gathers=gathers, keeps_activations=keeps),
        Part("videos to be scored", _video_bytes(job), ROLLOUT),
        Part("forward", work.forward, ("denoise",)),
        Part("decoding", decoding_bytes(job.policy, job.decoded, job.decoded_at_once, **split), ("decode",)),
        Part("VAE and image encoder", frozen if rests else 0, ("decode",)),
        Part("forward and backward", work.replay, ("replay",)),
    ]
    phases = {phase: on_gpu(parts, phase) for phase in PHASES if gathers or phase != "gather"}
    return Plan(phases, _sum(part for part in parts if part.on_host), gathers)


def _gathers(job: Job, resting: int) -> bool:
    """Whether rollouts gather the weights; `auto` follows `distributed.memory` for a GPU of the job's size."""
    if job.zero.stage != 3 or job.config.rollout.parameters != "auto":
        return job.zero.stage == 3 and job.config.rollout.parameters == "gathered"
    return missing_weights(job.zero, job.weights) <= SHARE_FOR_WEIGHTS * (room(job.gigabytes) - resting)


def _trajectory_bytes(job: Job) -> int:
    config = job.config
    points = config.sampler.num_steps + 1 if config.loss.replays_transitions else 1
    each = points * LATENTS_DTYPES[config.sampler.latents_dtype].itemsize
    if config.loss.compares_means or pulls_to_previous(config.loss):
        each += config.sampler.trained_count * FP32
    return job.samples * each * prod(job.latents)


def _video_bytes(job: Job) -> int:
    """Of the videos that wait for their scores, and of those just decoded."""
    video = job.config.video
    each = video.num_frames * 3 * video.height * video.width * FP32
    return (job.config.rollout.score_ahead + 1) * job.decoded_at_once * each


def count_step(job: Job) -> dict[str, Any]:
    """Numbers of a step: of groups that share a video, of videos, and of forwards and backwards on each rank.

    `passes` has one number for each update; `latents` are channels, frames, height, width; parameters are elements of
    all transformers.

    Raises:
        ConfigError: the batch does not divide over the ranks, or the policy cannot make the video.
    """
    check_world(job.config, job.ranks)
    rollout, sampler = job.config.rollout, job.config.sampler
    micro_batches = job.samples // rollout.micro_batch_size
    updates = split_updates(range(sampler.trained_count), job.config.optim.updates_per_rollout)
    return {
        "ranks": job.ranks,
        "groups": job.ranks // job.config.parallel.sequence,
        "samples": rollout.prompts_per_step * rollout.group_size,
        "samples_per_group": job.samples,
        "micro_batches": micro_batches,
        "forwards": micro_batches * sampler.num_steps,
        "passes": [micro_batches * len(steps) for steps in updates],
        "latents": job.latents,
        "parameters": job.weights.elements,
        "trained": sum(job.weights.trained),
    }


CHANGES = (  # in the order in which one would make them
    "policy.gradient_checkpointing: true",
    "policy.vae_slicing: true",
    "policy.vae_tiling: true",
    "policy.frozen_rest_on: cpu",
    "rollout.offload_trajectories: true",
    "rollout.parameters: sharded",
    "zero_optimization.stage: 3",
    "zero_optimization.reduce_bucket_size: 50_000_000",
    "rollout.micro_batch_size: 1",
    "rollout.score_ahead: 0",
    *(f"parallel.sequence: {ranks}" for ranks in (2, 4, 8)),  # within one host
    "zero_optimization.offload_optimizer: {device: cpu}",
    "policy.lora.rank: 32",
    "zero_optimization.offload_param: {device: cpu}",
)


def advise(job: Job, plan: Plan, gigabytes: float) -> tuple[list[str], Plan]:
    """The changes that bring a job onto GPUs of that size, and the plan with them, which may still not fit.

    Each change is tried in turn, and kept if it lowers the peak. The last is to take twice the GPUs.
    """
    kept: dict[str, str] = {}
    for words in (*CHANGES, f"--gpus {2 * job.ranks}"):
        if plan.fits(gigabytes):
            break
        changed = change(job, words)
        better = possible(changed)
        if better is not None and better.peak < WORTH * plan.peak:
            job, plan = changed, better
            kept[words.split()[0]] = words
    return list(kept.values()), plan


def change(job: Job, words: str) -> Job:
    """The job with one setting of its recipe, or of its DeepSpeed JSON, changed: `policy.vae_tiling: true`."""
    name, _, value = words.replace(":", "", 1).partition(" ")
    root = "ds_config" if name.startswith("zero_optimization") else "config"
    path = ["ranks"] if name == "--gpus" else [root, *name.split(".")]
    changed: Job = _with(job, path, yaml.safe_load(value))
    return changed


def _with(node: Any, path: Sequence[str], value: Any) -> Any:
    name, *inner = path
    if inner:
        value = _with(node[name] if isinstance(node, dict) else getattr(node, name), inner, value)
    return {**node, name: value} if isinstance(node, dict) else replace(node, **{name: value})


def possible(job: Job) -> Plan | None:
    """The plan of a changed job; None if the change does not suit its batch, its heads or its VAE."""
    try:
        return reckon(job)
    except ConfigError:
        return None


def readable(size: int) -> str:
    """Bytes in the unit of a GPU's size, or in MB below 1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"
