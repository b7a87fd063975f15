"""Seconds of a step's collectives: what ranks wait for, and what the compute hides."""

from __future__ import annotations

from dataclasses import dataclass

from bpgo_video.planning.cards import Rates
from bpgo_video.planning.footprint import Work
from bpgo_video.planning.job import Job, count_step
from bpgo_video.planning.memory import Plan
from bpgo_video.planning.zero import FP32

BACKWARD = 2 / 3  # of a replayed pass, without recomputation


@dataclass(frozen=True)
class Passes:
    """Passes of a rank through the transformer in a step.

    Attributes:
        forwards: of the rollout; with `rollout.guidance_every` a forward of one half of guidance is half a forward.
        replays: forwards with a backward; with `advantage.best_of` or pairs as if their samples divided evenly.
        extra: further forwards of the update, without gradients: of a reference, or of old velocities.
        updates: of the optimizer.
    """

    forwards: float
    replays: float
    extra: float
    updates: int

    @classmethod
    def of(cls, job: Job) -> Passes:
        step, loss, group = count_step(job), job.config.loss, job.config.rollout.group_size
        best = loss.dpo_pairs if loss.objective == "dpo" else job.config.advantage.best_of
        replays = sum(step["passes"]) * (1.0 if best is None else min(1.0, 2 * best / group))
        forwards = step["forwards"] * (1 - guidance_saved(job))
        return cls(forwards, replays, replays * extra_forwards(job), len(step["passes"]))


def guidance_saved(job: Job) -> float:
    """Share of a rollout's forwards that `rollout.guidance_every` saves: halves of steps that are not trained."""
    sampler, every = job.config.sampler, job.config.rollout.guidance_every
    trained = sampler.trained_count if job.config.loss.replays_transitions else 0
    return (1 - trained / sampler.num_steps) * (1 - 1 / every) / 2 if job.guided else 0.0


def extra_forwards(job: Job) -> int:
    """Forwards without gradients that each replayed pass needs besides."""
    loss, updates = job.config.loss, job.config.optim.updates_per_rollout
    reference = loss.uses_reference and loss.kl_reference != "previous"
    return int(reference) + int(loss.keeps_old_velocities(updates))


@dataclass(frozen=True)
class Waits:
    """Seconds that a rank waits for a kind of collective, and that the compute hides."""

    waited: float = 0.0
    hidden: float = 0.0

    @classmethod
    def behind(cls, total: float, compute: float, share: float = 1.0) -> Waits:
        """Of a collective of which `share` runs at the same time as the compute."""
        hidden = min(share * total, compute)
        return cls(total - hidden, hidden)

    def __mul__(self, times: float) -> Waits:
        return Waits(times * self.waited, times * self.hidden)

    def __add__(self, other: Waits) -> Waits:
        return Waits(self.waited + other.waited, self.hidden + other.hidden)


def communication(job: Job, plan: Plan, rates: Rates) -> dict[str, Waits]:
    """Collectives of a step, by the names of `time.PHASES`."""
    passes, foot = Passes.of(job), job.footprint
    group, ours = rates.between(job.config.parallel.sequence), 1 - 1 / job.config.parallel.sequence

    def exchange(work: Work) -> float:
        return work.exchanged * ours / group

    update = passes.replays * exchange(foot.replay) + passes.extra * exchange(foot.forward)
    return {
        "sequence group (rollout)": Waits(passes.forwards * exchange(foot.forward)),
        "sequence group (update)": Waits(update),
        **(_sharded if job.zero.stage == 3 else _replicated)(job, plan, rates, passes),
    }


def _replicated(job: Job, plan: Plan, rates: Rates, passes: Passes) -> dict[str, Waits]:
    """ZeRO 1 and 2: gradients are reduced each update, or each pass; an update's weights go to all ranks."""
    moved, reductions = _seconds_to_move(job, rates), passes.replays if job.zero.stage == 2 else passes.updates
    weights = moved * sum(job.weights.trained) * job.zero.weight_bytes
    return {
        "gather (rollout)": Waits(),
        "gather (update)": Waits(passes.updates * weights),
        "reduction": _reduction(job, rates) * reductions,
    }


def _sharded(job: Job, plan: Plan, rates: Rates, passes: Passes) -> dict[str, Waits]:
    """ZeRO-3: weights once for a rollout or an update, or block by block in every pass; gradients of every pass."""
    zero, foot, moved = job.zero, job.footprint, _seconds_to_move(job, rates)
    one = moved * foot.weights.elements * zero.weight_bytes  # of the transformer that computes
    whole = Waits(moved * job.weights.elements * zero.weight_bytes)
    ahead = min(1.0, zero.settings.prefetch_bucket_size / foot.weights.largest_block)
    forward, replay = foot.forward.operations / rates.forward, foot.replay.operations / rates.replay
    fetches = 1 + job.config.policy.checkpointed  # activations that are kept keep the weights
    block_by_block = Waits.behind(one, forward, ahead)
    update = Waits.behind(fetches * one, replay, ahead) * passes.replays + block_by_block * passes.extra
    reduction = _reduction(job, rates)
    if plan.gathers_update and job.config.optim.average == "update":
        reduction = Waits(reduction.waited + reduction.hidden) * passes.updates  # after all backwards
    else:
        reduction *= passes.replays
    return {
        "gather (rollout)": whole if plan.gathers else block_by_block * passes.forwards,
        "gather (update)": whole * passes.updates if plan.gathers_update else update,
        "reduction": reduction,
    }


def _seconds_to_move(job: Job, rates: Rates) -> float:
    """Of one byte from all ranks to all: each rank receives the shares of the others."""
    return (1 - 1 / job.ranks) / rates.between(job.ranks)


def _reduction(job: Job, rates: Rates) -> Waits:
    """Of the fp32 gradients of one pass, behind its backward if `overlap_comm` is on: ZeRO-3's default."""
    total = _seconds_to_move(job, rates) * FP32 * sum(job.footprint.weights.trained)
    backward = BACKWARD * job.footprint.replay.operations / rates.replay
    return Waits.behind(total, backward if job.zero.settings.overlap_comm else 0.0)
