"""How much memory does a rank need in each phase of a training step, and which phase is the tightest?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

from bpgo_video.config import Config, ConfigError
from bpgo_video.config_rules import check_world
from bpgo_video.engine import compute_dtype
from bpgo_video.parallel.memory import SHARE_FOR_WEIGHTS
from bpgo_video.planning import rehearsal
from bpgo_video.planning.inputs import Batch
from bpgo_video.planning.models import Model
from bpgo_video.planning.rehearsal import Footprint, Treatment
from bpgo_video.planning.zero import (
    FP32,
    Held,
    Parts,
    Zero,
    at_rest,
    during_backward,
    during_step,
    live_weights,
    missing_weights,
    untrained,
)
from bpgo_video.rollout import LATENTS_DTYPES, pulls_to_previous, trust_region

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
    def latents(self) -> tuple[int, int, int, int]:
        video = self.config.video
        return rehearsal.compression(self.model).latents(video.num_frames, video.height, video.width)

    @property
    def trained(self) -> int:
        """How many of the model's transformers are trained."""
        return len(self.model.transformers)

    @property
    def footprint(self) -> Footprint:
        config = self.config
        batch = Batch(
            samples=config.rollout.micro_batch_size * (2 if config.sampler.guidance_scale > 1 else 1),
            latents=self.latents,
            text_tokens=config.policy.max_sequence_length,
            dtype=compute_dtype(self.ds_config),
            token_timesteps=self.model.token_timesteps,
        )
        policy = config.policy
        treatment = Treatment(policy.gradient_checkpointing, policy.lora, config.parallel.sequence)
        return rehearsal.footprint(self.model, batch, treatment)


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
        ConfigError: the batch does not divide over the ranks, the VAE makes no such video, or the heads do not divide
            over the sequence group.
    """
    check_world(job.config, job.ranks)
    resting, work = _resting(job), job.footprint
    gathers = _gathers(job, resting)
    weights = missing_weights(job.zero, work) if gathers else live_weights(job.zero, work)
    beside = {"trajectories": _trajectories(job), "videos to be scored": _videos(job)}
    rolling = {**resting.device, "weights fetched": weights, **beside}
    updating = {**resting.device, "trajectories": beside["trajectories"]}
    phases = (
        Phase("denoise", {**rolling, "forward": work.forward}),
        Phase("decode", {**rolling, "VAE at work": _decoding(job)}),
        Phase(
            "replay",
            _sum(
                updating,
                {"weights fetched": live_weights(job.zero, work), "forward and backward": work.replay},
                during_backward(job.zero, work),
            ),
        ),
        Phase("update", _sum(updating, during_backward(job.zero, work), during_step(job.zero, work))),
    )
    return Plan(tuple(Phase(phase.name, _present(phase.parts)) for phase in phases), resting.host, gathers)


def _sum(*several: Parts) -> Parts:
    names = [name for parts in several for name in parts]
    return {name: sum(parts.get(name, 0) for parts in several) for name in dict.fromkeys(names)}


def _present(parts: Parts) -> Parts:
    return {name: size for name, size in parts.items() if size}


def _resting(job: Job) -> Held:
    """What is there in every phase."""
    held, config, work = Held(), job.config, job.footprint
    for number in range(len(job.model.transformers)):
        own = at_rest(job.zero, work, config) if number < job.trained else untrained(job.zero, work)
        held = Held(_sum(held.device, own.device), _sum(held.host, own.host))
    if config.loss.kl_weight and config.loss.kl_reference == "start" and not config.policy.lora.rank:
        held.add("reference", sum(untrained(job.zero, work).device.values()))
    held.add("VAE", rehearsal.vae_bytes(job.model))
    held.add("image encoder", job.model.image_encoder_parameters * job.zero.weight_bytes)
    held.add("reward models", job.reward_bytes)
    held.add("trajectories", _trajectory_bytes(job), on_host=True) if config.rollout.offload_trajectories else None
    return held


def _gathers(job: Job, resting: Held) -> bool:
    """What `rollout.parameters` comes to; `auto` by the rule of `parallel.memory`, on a GPU of the job's size."""
    if job.zero.stage != 3 or job.config.rollout.parameters == "sharded":
        return False
    if job.config.rollout.parameters == "gathered":
        return True
    free = room(job.gigabytes) - sum(resting.device.values())
    return missing_weights(job.zero, job.footprint) <= SHARE_FOR_WEIGHTS * free


def _samples(job: Job) -> int:
    """Of a training step on one rank; those of a sequence group make the same."""
    rollout = job.config.rollout
    groups = job.ranks // job.config.parallel.sequence
    return rollout.prompts_per_step * rollout.group_size // groups


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _trajectory_bytes(job: Job) -> int:
    config = job.config
    points = config.sampler.num_steps + 1 if config.loss.objective == "policy_gradient" else 1
    each = points * LATENTS_DTYPES[config.sampler.latents_dtype].itemsize
    if trust_region(config).needs_means or pulls_to_previous(config):
        each += config.sampler.trained_count * FP32
    return _samples(job) * each * _elements(job.latents)


def _trajectories(job: Job) -> int:
    return 0 if job.config.rollout.offload_trajectories else _trajectory_bytes(job)


def _decoded_at_once(job: Job) -> int:
    """Videos that a rank decodes together: a micro-batch's, or its part of a few where a sequence group shares them."""
    micro, sequence = job.config.rollout.micro_batch_size, job.config.parallel.sequence
    return micro * (sequence // gcd(sequence, micro)) // sequence


def _videos(job: Job) -> int:
    """Those that wait for their scores, and the ones just made."""
    video = job.config.video
    each = video.num_frames * 3 * video.height * video.width * FP32
    return (job.config.rollout.score_ahead + 1) * _decoded_at_once(job) * each


def _decoding(job: Job) -> int:
    return rehearsal.decoding(job.model, job.latents, _decoded_at_once(job))


__all__ = ["GPUS", "ConfigError", "Job", "Phase", "Plan", "reckon", "room"]
