"""How much memory does a rank need in each phase of a training step, and which phase is the tightest?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import Any

from bpgo_video.config.bpgo import Config
from bpgo_video.config.rules import check_world
from bpgo_video.distributed.engine import compute_dtype
from bpgo_video.distributed.memory import SHARE_FOR_WEIGHTS
from bpgo_video.policies import Policy
from bpgo_video.rollouts.rollout import LATENTS_DTYPES, pulls_to_previous, trust_region
from bpgo_video.training import plan_rehearsal as rehearsal
from bpgo_video.training.plan_inputs import Batch
from bpgo_video.training.plan_models import Model, described
from bpgo_video.training.plan_rehearsal import Footprint, Latents, Treatment
from bpgo_video.training.plan_zero import (
    FP32,
    Held,
    Parts,
    Weights,
    Zero,
    add_at_rest,
    add_reference,
    during_backward,
    during_step,
    live_weights,
    missing_weights,
    on_their_way,
)

RUNTIME = 2 * 10**9  # CUDA context, NCCL's buffers and cuBLAS's workspaces: an assumption, not measured
FRAGMENTED = 0.05  # of a GPU's memory that its allocator cannot use: an assumption, not measured
GPUS = (24, 40, 80, 141)


@dataclass(frozen=True)
class Job:
    """A recipe on a number of GPUs.

    Attributes:
        reward_bytes: of the reward models, weights and work, where they are on the policy's GPUs.
        gigabytes: of one GPU; it decides whether `rollout.parameters: auto` gathers.
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
        """The family's, without any network."""
        return described(self.model, self.config.policy)

    @cached_property
    def latents(self) -> Latents:
        """What is sampled, and kept of a path."""
        return self.policy.latent_shape(self.config.video)

    @property
    def computed(self) -> Latents:
        """What passes the transformer: the sampled frames behind those that an image gives."""
        return _with_frames(self.latents, self.policy.given_frames)

    @property
    def decoded(self) -> Latents:
        """What the VAE makes the video of: padding is dropped."""
        return _with_frames(self.computed, -self.policy.padding_frames)

    @cached_property
    def footprint(self) -> Footprint:
        """Of one of the model's transformers; where there are several, one computes at a time."""
        policy, rollout, sampler = self.config.policy, self.config.rollout, self.config.sampler
        halves = 2 if max(sampler.guidance_scale, sampler.guidance_scale_2 or 1) > 1 else 1
        batch = Batch(
            samples=rollout.micro_batch_size * halves,
            latents=self.computed,
            text_tokens=policy.max_sequence_length,
            dtype=compute_dtype(self.ds_config),
            given_frames=self.policy.given_frames,
        )
        treatment = Treatment(
            gradient_checkpointing=policy.gradient_checkpointing,
            lora=policy.lora,
            sequence=self.config.parallel.sequence,
            plan=self.policy.sequence_plan,
            inputs=type(self.policy).transformer_inputs,
        )
        return rehearsal.footprint(self.model, batch, treatment)

    @cached_property
    def weights(self) -> Weights:
        """Of all of the model's transformers, those that are not trained as they are published."""
        work, names = self.footprint, self.model.transformers
        trained = len(self.config.policy.trained or names)
        published = work.frozen if self.config.policy.lora.rank else work.trained
        return Weights(
            trained=work.trained * trained,
            frozen=work.frozen * trained + published * (len(names) - trained),
            largest_block=work.largest_block,
        )


def _with_frames(latents: Latents, more: int) -> Latents:
    channels, frames, height, width = latents
    return channels, frames + more, height, width


@dataclass(frozen=True)
class Phase:
    """A part of a training step, and what a rank's GPU holds at its peak."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank.

    Attributes:
        host: what rests in the host's memory.
        gathers: whether rollouts hold all weights on every rank.
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
        ConfigError: the batch does not divide over the ranks, the policy makes no such video, or the heads do not
            divide over the sequence group.
    """
    check_world(job.config, job.ranks)
    zero, weights, work, resting = job.zero, job.weights, job.footprint, _resting(job)
    gathers = _gathers(job, resting)
    fetched = {"weights fetched": missing_weights(zero, weights) if gathers else live_weights(zero, weights)}
    rolling = _sum(resting.device, {"videos to be scored": _videos(job)}, fetched)
    held = not job.config.policy.gradient_checkpointing
    live = {"weights fetched": live_weights(zero, weights, held_by_autograd=held)}
    whole = {"weights fetched": missing_weights(zero, weights), "weights on their way": on_their_way(zero, weights)}
    phases = (
        *([Phase("gather", _sum(resting.device, whole))] if gathers else []),
        Phase("denoise", _sum(rolling, {"forward": work.forward})),
        Phase("decode", _sum(rolling, _decoding(job))),
        Phase(
            "replay",
            _sum(resting.device, live, {"forward and backward": work.replay}, during_backward(zero, weights)),
        ),
        Phase("update", _sum(resting.device, during_step(zero, weights, job.config))),
    )
    return Plan(phases, resting.host, gathers)


def _sum(*several: Parts) -> Parts:
    """By name; what takes nothing is left out."""
    names = dict.fromkeys(name for parts in several for name in parts)
    sums = {name: sum(parts.get(name, 0) for parts in several) for name in names}
    return {name: size for name, size in sums.items() if size}


def _resting(job: Job) -> Held:
    """What is there in every phase of a step."""
    held, config = Held(), job.config
    add_at_rest(held, job.zero, job.weights, config)
    if config.loss.kl_weight and config.loss.kl_reference == "start" and not config.policy.lora.rank:
        add_reference(held, job.zero, job.weights)
    held.add("VAE and image encoder", _frozen_bytes(job), config.policy.frozen_rest_on == "cpu")
    held.add("trajectories", _trajectory_bytes(job), config.rollout.offload_trajectories)
    held.add("reward models", job.reward_bytes)
    return held


def _frozen_bytes(job: Job) -> int:
    return rehearsal.vae_bytes(job.model) + job.model.image_encoder_parameters * job.zero.weight_bytes


def _gathers(job: Job, resting: Held) -> bool:
    """What `rollout.parameters` comes to; `auto` by the rule of `parallel.memory`, on a GPU of the job's size."""
    if job.zero.stage != 3 or job.config.rollout.parameters != "auto":
        return job.zero.stage == 3 and job.config.rollout.parameters == "gathered"
    free = room(job.gigabytes) - sum(resting.device.values())
    return missing_weights(job.zero, job.weights) <= SHARE_FOR_WEIGHTS * free


def _samples(job: Job) -> int:
    """Of a training step on one rank; those of a sequence group make the same."""
    rollout = job.config.rollout
    groups = job.ranks // job.config.parallel.sequence
    return rollout.prompts_per_step * rollout.group_size // groups


def _trajectory_bytes(job: Job) -> int:
    config = job.config
    points = config.sampler.num_steps + 1 if config.loss.objective == "policy_gradient" else 1
    each = points * LATENTS_DTYPES[config.sampler.latents_dtype].itemsize
    if trust_region(config.loss).needs_means or pulls_to_previous(config.loss):
        each += config.sampler.trained_count * FP32
    return _samples(job) * each * prod(job.latents)


def _decoded_at_once(job: Job) -> int:
    """Videos that a rank decodes together: a micro-batch's, or its part of a few where a sequence group shares them."""
    micro, sequence = job.config.rollout.micro_batch_size, job.config.parallel.sequence
    return micro * (sequence // gcd(sequence, micro)) // sequence


def _videos(job: Job) -> int:
    """Those that wait for their scores, and the ones just made."""
    video = job.config.video
    each = video.num_frames * 3 * video.height * video.width * FP32
    return (job.config.rollout.score_ahead + 1) * _decoded_at_once(job) * each


def _decoding(job: Job) -> Parts:
    policy = job.config.policy
    work = rehearsal.decoding(job.model, job.decoded, _decoded_at_once(job), policy.vae_tiling, policy.vae_slicing)
    resting_elsewhere = rehearsal.vae_bytes(job.model) if policy.frozen_rest_on == "cpu" else 0
    return {"decoding": work, "VAE and image encoder": resting_elsewhere}
