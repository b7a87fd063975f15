"""What to change when a recipe does not fit? Settings in the order in which one would rather give them up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bpgo_video.config.bpgo import ConfigError, LoraConfig
from bpgo_video.training.plan import Job, Plan, reckon

WORTH = 0.99  # of the peak: what lowers it by less is left as it is
MOST_SHARED = 8  # ranks of a sequence group: those of one host
Change = Callable[[Job], Job | None]  # None where it is so already


def setting(section: str, **values: Any) -> Change:
    """A change of the recipe."""

    def change(job: Job) -> Job | None:
        before = getattr(job.config, section)
        after = replace(before, **values)
        return None if after == before else replace(job, config=replace(job.config, **{section: after}))

    return change


def zero(**values: Any) -> Change:
    """A change of the DeepSpeed JSON's `zero_optimization`."""

    def change(job: Job) -> Job | None:
        before = job.ds_config["zero_optimization"]
        after = {**before, **values}
        return None if after == before else replace(job, ds_config={**job.ds_config, "zero_optimization": after})

    return change


def longer_sequence_groups(job: Job) -> Job | None:
    sequence = 2 * job.config.parallel.sequence
    return None if sequence > MOST_SHARED else setting("parallel", sequence=sequence)(job)


def adapters(job: Job) -> Job | None:
    return None if job.config.policy.lora.rank else setting("policy", lora=LoraConfig(rank=32))(job)


def more_gpus(job: Job) -> Job:
    return replace(job, ranks=2 * job.ranks)


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
    "twice the GPUs": more_gpus,
}


@dataclass(frozen=True)
class Advice:
    """Changes that one makes together, in their order, and what a rank then needs at most.

    Attributes:
        fits: whether they are enough.
    """

    changes: tuple[str, ...]
    peak: int
    fits: bool


def advise(job: Job, plan: Plan, gigabytes: float) -> Advice:
    """The changes that bring a job onto GPUs of that size: each is kept where it lowers the peak."""
    kept: tuple[str, ...] = ()
    for words, change in CHANGES.items():
        if plan.fits(gigabytes):
            break
        changed = change(job)
        better = None if changed is None else possible(changed)
        if changed is not None and better is not None and better.peak < WORTH * plan.peak:
            job, plan, kept = changed, better, (*kept, words)
    return Advice(kept, plan.peak, plan.fits(gigabytes))


def possible(job: Job) -> Plan | None:
    """The plan of a changed job; None where the change does not go with its batch, its heads or its VAE."""
    try:
        return reckon(job)
    except ConfigError:
        return None
