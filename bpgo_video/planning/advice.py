"""Changes of a recipe that bring its job onto smaller GPUs, or use what a larger one leaves free."""

from __future__ import annotations

from math import ceil

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.planning.job import Job, change
from bpgo_video.planning.memory import Plan, reckon, room

WORTH = 0.99  # of the peak: a change that lowers it by less is not advised
CHANGES = (  # in the order in which one would make them
    "policy.gradient_checkpointing: true",
    "policy.vae_slicing: true",
    "policy.vae_tiling: true",
    "policy.frozen_rest_on: cpu",
    "rollout.offload_trajectories: true",
    "optim.average: micro_batch",
    "optim.parameters: sharded",
    "rollout.parameters: sharded",
    "zero_optimization.stage: 3",
    "zero_optimization.reduce_bucket_size: 50_000_000",
    "rollout.micro_batch_size: 1",
    "rollout.sample_ahead: false",
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


def spare(job: Job, plan: Plan, gigabytes: float) -> tuple[str, Job, Plan] | None:
    """The setting with which memory that the replay leaves free saves recomputing blocks; None if it holds none.

    Returns:
        The setting, the job and the plan with it.
    """
    if not plan.fits(gigabytes) or job.config.policy.checkpointed != 1:
        return None
    two, three = (job.footprint_of(checkpointed=0.0, blocks=count).replay.peak for count in (2, 3))
    blocks, each = job.footprint.blocks, three - two
    if job.zero.stage == 3:  # activations may keep the weights
        each += job.footprint.weights.largest_block * job.zero.weight_bytes
    kept = min(int((room(gigabytes) - plan.totals["replay"]) / each), blocks - 1)
    if kept < 1:
        return None
    words = f"policy.checkpointed_share: {ceil(100 * (blocks - kept) / blocks) / 100}"
    changed = change(job, words)
    return (words, changed, found) if (found := reckon(changed)).fits(gigabytes) else None


def possible(job: Job) -> Plan | None:
    """The plan of a changed job; None if the change does not suit its batch, its heads or its VAE."""
    try:
        return reckon(job)
    except ConfigError:
        return None
