"""Memory plan of a job: bytes of a rank in each phase of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from bpgo_video.config.rules import check_world
from bpgo_video.distributed.memory import SHARE_FOR_WEIGHTS
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.planning.footprint import vae_bytes
from bpgo_video.planning.job import Job
from bpgo_video.planning.zero import (
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
from bpgo_video.rollouts.denoiser import LATENTS_DTYPES, pulls_to_previous
from bpgo_video.rollouts.forwards import tree_of
from bpgo_video.rollouts.prefixes import spreads
from bpgo_video.rollouts.rollout import chunks_of_rank

RUNTIME = 2 * 10**9  # CUDA context, NCCL's buffers and cuBLAS's workspaces: an assumption, not measured
HOST_PROCESS = 3 * 10**9  # Python, its packages and CUDA's libraries on the host: an assumption, not measured
FRAGMENTED = 0.05  # share of a GPU's memory that its allocator cannot use: an assumption, not measured


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank.

    Attributes:
        phases: of a training step, each with what a rank's GPU holds at its peak.
        host: in the host's memory.
        gathers, gathers_update: rollouts, and updates, hold all weights on every rank.
    """

    phases: Mapping[str, Parts]
    host: Parts
    gathers: bool
    gathers_update: bool = False

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


def host_loading(job: Job, plan: Plan) -> int:
    """Bytes of the host's memory that a rank holds at most while a run starts.

    Networks are read one after the other, and go to the GPU: under ZeRO-3 the transformers by single tensors, else
    whole; VAE, image encoder and rewards whole.
    """
    zero, weights = job.zero, job.weights
    largest = max((*weights.trained, *weights.frozen))
    encoder = job.model.image_encoder_parameters * zero.weight_bytes
    read = (
        (largest if zero.stage == 3 else weights.elements) * zero.weight_bytes,
        vae_bytes(job.policy, torch.float32) + encoder,
        job.reward.resting + job.reward.offloaded,
    )
    kept = sum(size for name, size in plan.host.items() if name != "checkpoint")
    return HOST_PROCESS + max(read) + kept


def host_saving(plan: Plan) -> int:
    """Bytes of the host's memory that a rank holds while a checkpoint is written."""
    return HOST_PROCESS + sum(plan.host.values())


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
    frozen, rests = vae_bytes(job.policy, job.vae_dtype), settings.frozen_rest_on == "cpu"
    encoder = job.model.image_encoder_parameters * zero.weight_bytes
    reference = config.loss.uses_reference and config.loss.kl_reference == "start" and not settings.lora.rank
    resting = [
        *zero_at_rest(zero, weights, config, reference),
        Part("VAE and image encoder", frozen + encoder, on_host=rests),
        Part("trajectories", _trajectory_bytes(job), on_host=config.rollout.offload_trajectories),
        Part("reward models", job.reward.resting),
    ]
    resting.append(Part("reward models", job.reward.offloaded, on_host=True))
    gathers = _gathers(job, sum(on_gpu(resting, "denoise").values()))
    pixels = _chunk_bytes(job) * config.parallel.sequence  # of a micro-batch, which each rank decodes; and gradients
    keeps, scoring = 1 - settings.checkpointed, PHASES if config.rollout.sample_ahead else ROLLOUT
    parts = [
        *resting,
        *zero_at_work(zero, weights, config, gathers=gathers, keeps=keeps),
        Part("shared steps", _prefix_bytes(job), ROLLOUT),
        Part("videos to be scored", chunks_waiting(job) * _chunk_bytes(job), scoring),
        Part("videos to be scored", _chunk_bytes(job), ROLLOUT),
        Part("reward models", job.reward.offloaded + job.reward.work, scoring),
        Part("forward", work.forward.peak, ("denoise",)),
        Part("decoding", job.decoding.peak, ("decode",)),
        Part("VAE and image encoder", frozen if rests else 0, ("decode",)),
        Part("forward and backward", work.replay.peak, ("replay",)),
        Part("decoding", job.differentiated.peak if job.differentiated else 0, ("replay",)),
        Part("videos to be scored", 2 * pixels if job.differentiated else 0, ("replay",)),
        Part("reward models", job.reward.work if job.differentiated else 0, ("replay",)),
    ]
    phases = {phase: on_gpu(parts, phase) for phase in PHASES if gathers or phase != "gather"}
    updates = _gathers_update(job, sum(on_gpu(resting, "replay").values()), sum(phases["replay"].values()))
    return Plan(phases, sums(part for part in parts if part.on_host), gathers, updates)


def _gathers(job: Job, resting: int) -> bool:
    """Whether rollouts gather the weights; `auto` follows `distributed.memory` for a GPU of the job's size."""
    if job.zero.stage != 3 or job.config.rollout.parameters != "auto":
        return job.zero.stage == 3 and job.config.rollout.parameters == "gathered"
    return missing_weights(job.zero, job.weights) <= SHARE_FOR_WEIGHTS * (room(job.gigabytes) - resting)


def _gathers_update(job: Job, resting: int, replaying: int) -> bool:
    """Whether updates gather the weights; `auto` does from the second one on, if the first leaves room for them."""
    if job.zero.stage != 3 or job.config.optim.parameters != "auto":
        return job.zero.stage == 3 and job.config.optim.parameters == "gathered"
    free = room(job.gigabytes) - resting
    return missing_weights(job.zero, job.weights) <= min(SHARE_FOR_WEIGHTS * free, free - (replaying - resting))


def _trajectory_bytes(job: Job) -> int:
    config = job.config
    points = config.sampler.num_steps + 1 if config.loss.records_path else 1
    each = points * LATENTS_DTYPES[config.sampler.latents_dtype].itemsize
    if config.loss.compares_means or pulls_to_previous(config.loss):
        each += config.sampler.trained_count * FP32
    if config.loss.keeps_old_velocities(config.optim.updates_per_rollout):
        each += config.sampler.trained_count * FP32
    return job.samples * each * prod(job.latents) * (2 if config.rollout.sample_ahead else 1)


def _prefix_bytes(job: Job) -> int:
    """At most: the latents that the samples of each prompt of a rank have in common, with `rollout.same_start`.

    With `rollout.branches` also the paths of the samples that are denoised together, in points and as a whole.
    """
    rollout, sampler = job.config.rollout, job.config.sampler
    if not rollout.same_start:
        return 0
    mesh = Mesh(0, job.ranks // job.config.parallel.sequence, torch.device("cpu"))
    held = rollout.prompts_per_step
    if job.policy.media or rollout.branches or not spreads(mesh, rollout.group_size, rollout.micro_batch_size):
        held = min(held, -(-job.samples // rollout.group_size) + 1)  # the first and the last may be parts of groups
    if rollout.branches:
        held += 2 * tree_of(job.config, mesh.data_size).samples
    return held * sampler.num_steps * LATENTS_DTYPES[sampler.latents_dtype].itemsize * prod(job.latents)


def chunks_waiting(job: Job) -> int:
    """Chunks of a rank that may wait for their scores."""
    rollout, sequence = job.config.rollout, job.config.parallel.sequence
    mesh = Mesh(0, job.ranks, torch.device("cpu"), sequence)
    return chunks_of_rank(rollout, mesh) if rollout.sample_ahead else rollout.score_ahead


def _chunk_bytes(job: Job) -> int:
    """Of the videos that are decoded together."""
    video = job.config.video
    return job.decoded_at_once * video.num_frames * 3 * video.height * video.width * FP32
