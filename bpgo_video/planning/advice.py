"""Changes of a recipe that bring its job onto smaller GPUs."""

from __future__ import annotations

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.planning.job import Job, change
from bpgo_video.planning.memory import Plan, reckon

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


def possible(job: Job) -> Plan | None:
    """The plan of a changed job; None if the change does not suit its batch, its heads or its VAE."""
    try:
        return reckon(job)
    except ConfigError:
        return None
