"""Memory plan of a recipe: bytes of a rank in each phase of a training step, and changes that reduce them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd, prod
from typing import Any

from bpgo_video.config.bpgo import Config, ConfigError, LoraConfig
from bpgo_video.config.rules import check_world
from bpgo_video.diffusion.steps import split_updates
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.policies import Policy
from bpgo_video.policies.base import LatentShape
from bpgo_video.rollouts.rollout import LATENTS_DTYPES, pulls_to_previous
from bpgo_video.training.memory import SHARE_FOR_WEIGHTS
from bpgo_video.training.plan_models import Model, policy_of
from bpgo_video.training.plan_rehearsal import Footprint, decoding_bytes, footprint, vae_bytes
from bpgo_video.training.plan_zero import (
    FP32,
    Held,
    Parts,
    Weights,
    Zero,
    during_backward,
    during_step,
    gather_buffer,
    held_at_rest,
    live_weights,
    missing_weights,
)

RUNTIME = 2 * 10**9  # CUDA context, NCCL's buffers and cuBLAS's workspaces: an assumption, not measured
FRAGMENTED = 0.05  # share of a GPU's memory that its allocator cannot use: an assumption, not measured
GPUS = (24, 40, 80, 141)  # gigabytes
WORTH = 0.99  # of the peak: a change that lowers it by less is not advised
MOST_SHARED = 8  # ranks of a sequence group: those of one host


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
        work, names = self.footprint, self.model.transformers
        trained = len(self.config.policy.trained or names)
        published = work.frozen if self.config.policy.lora.rank else work.trained
        frozen = work.frozen * trained + published * (len(names) - trained)
        return Weights(work.trained * trained, frozen, work.largest_block)


@dataclass(frozen=True)
class Phase:
    """A phase of a training step, and what a rank's GPU holds at its peak."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank.

    Attributes:
        host: in the host's memory.
        gathers: rollouts hold all weights on every rank.
    """

    phases: tuple[Phase, ...]
    host: Parts
    gathers: bool

    @property
    def tightest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        return self.tightest.total

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
    zero, weights, work, resting = job.zero, job.weights, job.footprint, _held(job)
    gathers = _gathers(job, resting)
    missing = {"weights fetched": missing_weights(zero, weights)}
    fetched = missing if gathers else {"weights fetched": live_weights(zero, weights)}
    keeps_activations = not job.config.policy.gradient_checkpointing
    live = {"weights fetched": live_weights(zero, weights, held_by_autograd=keeps_activations)}
    rollout = _sum(resting.device, {"videos to be scored": _video_bytes(job)}, fetched)
    phases = {
        "gather": _sum(resting.device, missing, {"weights on their way": gather_buffer(zero, weights)}),
        "denoise": _sum(rollout, {"forward": work.forward}),
        "decode": _sum(rollout, _decoding(job)),
        "replay": _sum(resting.device, live, {"forward and backward": work.replay}, during_backward(zero, weights)),
        "update": _sum(resting.device, during_step(zero, weights, job.config)),
    }
    if not gathers:
        del phases["gather"]
    return Plan(tuple(Phase(name, parts) for name, parts in phases.items()), resting.host, gathers)


def _sum(*several: Parts) -> Parts:
    """Sums by name, without zeros."""
    names = dict.fromkeys(name for parts in several for name in parts)
    sums = {name: sum(parts.get(name, 0) for parts in several) for name in names}
    return {name: size for name, size in sums.items() if size}


def _held(job: Job) -> Held:
    """What is held in every phase."""
    config = job.config
    reference = bool(config.loss.kl_weight and config.loss.kl_reference == "start" and not config.policy.lora.rank)
    held = held_at_rest(job.zero, job.weights, config, reference)
    frozen = vae_bytes(job.policy) + job.model.image_encoder_parameters * job.zero.weight_bytes
    held.add("VAE and image encoder", frozen, config.policy.frozen_rest_on == "cpu")
    held.add("trajectories", _trajectory_bytes(job), config.rollout.offload_trajectories)
    held.add("reward models", job.reward_bytes)
    return held


def _gathers(job: Job, resting: Held) -> bool:
    """Whether rollouts gather the weights; `auto` follows `training.memory` for a GPU of the job's size."""
    if job.zero.stage != 3 or job.config.rollout.parameters != "auto":
        return job.zero.stage == 3 and job.config.rollout.parameters == "gathered"
    free = room(job.gigabytes) - sum(resting.device.values())
    return missing_weights(job.zero, job.weights) <= SHARE_FOR_WEIGHTS * free


def _trajectory_bytes(job: Job) -> int:
    config = job.config
    points = config.sampler.num_steps + 1 if config.loss.replays_transitions else 1
    each = points * LATENTS_DTYPES[config.sampler.latents_dtype].itemsize
    if config.loss.compares_means or pulls_to_previous(config.loss):
        each += config.sampler.trained_count * FP32
    return job.samples * each * prod(job.latents)


def _decoded_at_once(job: Job) -> int:
    """Videos that a rank decodes together: a micro-batch's, or its part of a few in a sequence group."""
    micro, sequence = job.config.rollout.micro_batch_size, job.config.parallel.sequence
    return micro * (sequence // gcd(sequence, micro)) // sequence


def _video_bytes(job: Job) -> int:
    """Of the videos that wait for their scores, and of those just decoded."""
    video = job.config.video
    each = video.num_frames * 3 * video.height * video.width * FP32
    return (job.config.rollout.score_ahead + 1) * _decoded_at_once(job) * each


def _decoding(job: Job) -> Parts:
    policy = job.config.policy
    settings = {"tiling": policy.vae_tiling, "slicing": policy.vae_slicing}
    return {
        "decoding": decoding_bytes(job.policy, job.decoded, _decoded_at_once(job), **settings),
        "VAE and image encoder": vae_bytes(job.policy) if policy.frozen_rest_on == "cpu" else 0,
    }


@dataclass(frozen=True)
class StepCounts:
    """Numbers of one training step.

    Attributes:
        ranks, groups: GPUs, and sequence groups (of one GPU each without sequence parallelism).
        samples: videos of a step, over all ranks.
        samples_per_group: videos of a step that one group makes.
        micro_batches: forwards of a denoising step on each rank.
        forwards: of a rollout on each rank.
        passes: forwards and backwards of each update on each rank.
        latents: channels, frames, height, width.
        parameters, trained: elements of all transformers, and of those that learn.
    """

    ranks: int
    groups: int
    samples: int
    samples_per_group: int
    micro_batches: int
    forwards: int
    passes: tuple[int, ...]
    latents: LatentShape
    parameters: int
    trained: int


def count_step(job: Job) -> StepCounts:
    """The numbers of a job's step.

    Raises:
        ConfigError: the batch does not divide over the ranks, or the policy cannot make the video.
    """
    check_world(job.config, job.ranks)
    rollout, sampler = job.config.rollout, job.config.sampler
    micro_batches = job.samples // rollout.micro_batch_size
    updates = split_updates(range(sampler.trained_count), job.config.optim.updates_per_rollout)
    return StepCounts(
        ranks=job.ranks,
        groups=job.ranks // job.config.parallel.sequence,
        samples=rollout.prompts_per_step * rollout.group_size,
        samples_per_group=job.samples,
        micro_batches=micro_batches,
        forwards=micro_batches * sampler.num_steps,
        passes=tuple(micro_batches * len(steps) for steps in updates),
        latents=job.latents,
        parameters=job.weights.elements,
        trained=sum(job.weights.trained),
    )


# Advice: changes in the order in which one would make them

Change = Callable[[Job], Job]  # the same job if the change is made already, or not possible


def setting(section: str, **values: Any) -> Change:
    """Change a section of the recipe."""
    return lambda job: replace(
        job, config=replace(job.config, **{section: replace(getattr(job.config, section), **values)})
    )


def zero(**values: Any) -> Change:
    """Change `zero_optimization` of the DeepSpeed JSON."""
    return lambda job: replace(
        job, ds_config={**job.ds_config, "zero_optimization": {**job.ds_config["zero_optimization"], **values}}
    )


def longer_sequence_groups(job: Job) -> Job:
    sequence = 2 * job.config.parallel.sequence
    return job if sequence > MOST_SHARED else setting("parallel", sequence=sequence)(job)


def adapters(job: Job) -> Job:
    return job if job.config.policy.lora.rank else setting("policy", lora=LoraConfig(rank=32))(job)


CHANGES: dict[str, Change] = {
    "policy.gradient_checkpointing: true": setting("policy", gradient_checkpointing=True),
    "policy.vae_slicing: true": setting("policy", vae_slicing=True),
    "policy.vae_tiling: true": setting("policy", vae_tiling=True),
    "policy.frozen_rest_on: cpu": setting("policy", frozen_rest_on="cpu"),
    "rollout.offload_trajectories: true": setting("rollout", offload_trajectories=True),
    "rollout.parameters: sharded": setting("rollout", parameters="sharded"),
    "zero_optimization.stage: 3": zero(stage=3),
    "zero_optimization.reduce_bucket_size: 5e7": zero(reduce_bucket_size=50_000_000),
    "rollout.micro_batch_size: 1": setting("rollout", micro_batch_size=1),
    "rollout.score_ahead: 0": setting("rollout", score_ahead=0),
    "parallel.sequence: 2, or twice as many as now": longer_sequence_groups,
    "parallel.sequence: twice as many again": longer_sequence_groups,
    "zero_optimization.offload_optimizer: cpu": zero(offload_optimizer={"device": "cpu"}),
    "policy.lora.rank: 32": adapters,
    "zero_optimization.offload_param: cpu": zero(offload_param={"device": "cpu"}),
    "twice the GPUs": lambda job: replace(job, ranks=2 * job.ranks),
}


@dataclass(frozen=True)
class Advice:
    """Changes to make together, in order, and what a rank then needs at most.

    Attributes:
        fits: they are enough.
    """

    changes: tuple[str, ...]
    peak: int
    fits: bool


def advise(job: Job, plan: Plan, gigabytes: float) -> Advice:
    """The changes that bring a job onto GPUs of that size: each is kept if it lowers the peak."""
    kept: tuple[str, ...] = ()
    for words, change in CHANGES.items():
        if plan.fits(gigabytes):
            break
        changed = change(job)
        better = None if changed == job else possible(changed)
        if better is not None and better.peak < WORTH * plan.peak:
            job, plan, kept = changed, better, (*kept, words)
    return Advice(kept, plan.peak, plan.fits(gigabytes))


def possible(job: Job) -> Plan | None:
    """The plan of a changed job; None if the change does not suit its batch, its heads or its VAE."""
    try:
        return reckon(job)
    except ConfigError:
        return None
