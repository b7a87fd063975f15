"""A time plan as a table and as JSON: seconds of a step, hours, GPU-hours, bytes on disk and on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from bpgo_video.planning.cards import LINK_SHARE, Rates
from bpgo_video.planning.communication import Passes
from bpgo_video.planning.job import Job, count_step, readable
from bpgo_video.planning.memory import HOST_PROCESS, Plan, host_loading, host_saving
from bpgo_video.planning.time import PHASES, Bill

ROWS = {  # of the table -> parts of the seconds
    "rollout: denoising": ("denoising",),
    "rollout: decoding": ("decoding",),
    "reward": ("reward",),
    "update: replay": ("replay",),
    "update: optimizer": ("optimizer",),
    "communication: weights": ("gather (rollout)", "gather (update)"),
    "communication: gradients": ("reduction",),
    "communication: sequence group": ("sequence group (rollout)", "sequence group (update)"),
}


def step_table(job: Job, cost: Bill, rates: Rates) -> Table:
    """Seconds of a step by part."""
    title = f"Seconds of a step on {job.gpus} ({rates.source})"
    table = Table(box=box.ROUNDED, title=title, title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    table.add_column("of each GPU")
    explained, whole = explanations(job), sum(cost.seconds.values())
    for row, parts in ROWS.items():
        seconds = sum(cost.seconds[part] for part in parts)
        if seconds or row in explained:
            table.add_row(row, number(seconds), f"{seconds / whole:.0%}", explained.get(row, ""))
    if cost.overlapped:
        hides = "rewards beside rollout and update (rollout.sample_ahead)"
        table.add_row("at the same time", f"-{number(cost.overlapped)}", f"-{cost.overlapped / whole:.0%}", hides)
    table.add_section()
    by_phase = ", ".join(f"{name} {number(cost.phase(name))}" for name in PHASES)
    table.add_row("together", number(cost.step), "", by_phase)
    return table


def explanations(job: Job) -> dict[str, str]:
    """What a GPU does in each part of a step."""
    foot, step = job.footprint, count_step(job)
    replays = f"{Passes.of(job).replays:.4g} passes with backward, {quantity(foot.replay.operations)} each"
    videos = f"{job.samples / job.config.parallel.sequence:g} videos"
    return {
        "rollout: denoising": f"{Passes.of(job).forwards:.4g} forwards, {quantity(foot.forward.operations)} each",
        "rollout: decoding": f"{videos}, {quantity(job.decoding.operations / job.decoded_at_once)} each",
        "reward": f"{videos}, {quantity(job.reward.operations + job.reward.half_operations)} each",
        "update: replay": replays,
        "update: optimizer": f"{len(step['passes'])} updates",
    }


def bill_lines(job: Job, plan: Plan, cost: Bill, price: float | None) -> Iterator[str]:
    """Hours, cost, and bytes besides those on the GPUs."""
    run, ranks = job.config.run, job.ranks
    evaluations = f"{cost.evaluations} evaluations of {60 * cost.evaluation:.3g} min" if cost.evaluations else ""
    parts = [f"{run.num_steps} steps {hours(run.num_steps * cost.step / 3600)}", *filter(None, [evaluations])]
    if cost.prior_prompts:
        videos = cost.prior_prompts * job.config.prior.samples
        parts.append(f"priors of at most {cost.prior_prompts:,} prompts ({videos:,} videos) {hours(cost.priors)}, once")
    gpu_hours = cost.hours * ranks
    paid = "" if price is None else f", a cost of {price * gpu_hours:,.0f} at {price:g} each"
    yield f"{hours(cost.hours)} on {job.gpus}: {count(gpu_hours)} GPU-hours{paid}"
    yield f"  {', '.join(parts)}"
    if cost.hidden:
        yield f"  a step {number(cost.step)} s, and {number(cost.hidden)} s of communication behind its compute"
    checkpoints = f"a checkpoint {readable(cost.checkpoint)}, those kept {readable(cost.kept)}"
    yield f"Disk: {checkpoints}, exports {readable(cost.export)}"
    loading, saving = readable(host_loading(job, plan)), readable(host_saving(plan))
    resting = ", ".join(f"{name} {readable(size)}" for name, size in plan.host.items())
    yield f"Host, for each rank: {loading} while loading, {saving} while saving" + (f" ({resting})" if resting else "")


def assumptions(job: Job, rates: Rates) -> str:
    """What the seconds rest on."""
    settings, measured = job.zero.settings, rates.source.startswith("measured")
    arithmetic = "the measured rates" if measured else f"all arithmetic at that share of the peak ({rates.source})"
    ahead = (
        f"; ZeRO-3 fetches {settings.prefetch_bucket_size / 1e6:,.0f}M elements ahead and holds "
        f"{settings.max_live_parameters / 1e6:,.0f}M"
        if job.zero.stage == 3
        else ""
    )
    scores = "scores that do not overlap with the rollout"
    if job.config.rollout.sample_ahead:
        scores = "rewards on devices of their own, which score while this one samples and trains"
    return (
        f"Assumed{'' if measured else ', nothing of it measured'}: {arithmetic}; {LINK_SHARE:.0%} of the links, "
        f"{rates.link / LINK_SHARE / 1e9:g} GB/s within a host of {rates.gpus_per_host} and "
        f"{rates.network / LINK_SHARE * 8 / 1e9:g} Gb/s for each GPU between hosts; {scores}; "
        f"{readable(HOST_PROCESS)} of host memory for a process; as many prompts as the recipe allows, where their "
        f"shards are not here{ahead}. Waiting for files and for slower ranks is left out."
    )


def bill_as_json(job: Job, plan: Plan, cost: Bill, rates: Rates, price: float | None) -> dict[str, Any]:
    gpu_hours = cost.hours * job.ranks
    return {
        "rates": {name: value for name, value in vars(rates).items() if value is not None},
        "seconds": {**cost.seconds, "step": cost.step, **{name: cost.phase(name) for name in PHASES}},
        "seconds_hidden": cost.hidden,
        "seconds_overlapped": cost.overlapped,
        "operations": cost.work,
        "hours": {"run": cost.run, "evaluation": cost.evaluation, "priors": cost.priors, "all": cost.hours},
        "evaluations": cost.evaluations,
        "prior_prompts": cost.prior_prompts,
        "gpu_hours": gpu_hours,
        "cost": None if price is None else price * gpu_hours,
        "disk": {"checkpoint": cost.checkpoint, "checkpoints": cost.kept, "exports": cost.export},
        "host_peak": {"loading": host_loading(job, plan), "saving": host_saving(plan)},
    }


def quantity(operations: float) -> str:
    """Floating-point operations in the unit that leaves one to three digits before the point."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if operations >= size:
            return f"{operations / size:.3g} {unit}"
    return f"{operations / 1e6:.3g} MFLOP"


def number(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.2g}" if seconds < 1 else f"{seconds:.1f}"


def count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def hours(value: float) -> str:
    return f"{value:.3g} h" if value >= 1 else f"{60 * value:.2g} min"
