"""Memory plan of a job: bytes of a rank in each phase of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from bpgo_video.config.rules import check_world
from bpgo_video.distributed.memory import SHARE_FOR_WEIGHTS
from bpgo_video.rollouts.denoiser import LATENTS_DTYPES, pulls_to_previous
from bpgo_video.training.plan import Job
from bpgo_video.training.plan_footprint import decoding_bytes, vae_bytes
from bpgo_video.training.plan_zero import (
    FP32,
    PHASES,
    ROLLOUT,
    Part,
    Parts,
    missing_weights,
    on_gpu,
    sums,
    zero_at_rest,
    zero_at_work,
)

RUNTIME = 2 * 10**9  # CUDA context, NCCL's buffers and cuBLAS's workspaces: an assumption, not measured
FRAGMENTED = 0.05  # share of a GPU's memory that its allocator cannot use: an assumption, not measured


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
    return Plan(phases, sums(part for part in parts if part.on_host), gathers)


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
