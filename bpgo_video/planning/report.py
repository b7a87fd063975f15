"""A plan as text and as JSON: what fits, what takes the most, what to change, and what the run costs."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.planning.advice import advise, spare
from bpgo_video.planning.bill_report import assumptions, bill_as_json, bill_lines, step_table
from bpgo_video.planning.cards import Rates
from bpgo_video.planning.deployment import differences
from bpgo_video.planning.job import Job, count_step, readable
from bpgo_video.planning.memory import Plan, reckon, room
from bpgo_video.planning.time import Bill, bill
from bpgo_video.planning.zero import Parts

LARGEST = 4  # parts of a phase that the summary names
Advised = dict[int, tuple[list[str], Plan]]  # gigabytes -> changes, and the plan with them
Spare = dict[
    int, tuple[str, Plan, float]
]  # gigabytes -> a change, the plan with it, and the seconds of a step it saves


@dataclass(frozen=True)
class Report:
    """A plan with its bill, for GPUs of some sizes.

    Attributes:
        price: of a GPU-hour.
        spare: what memory that is left free can save.
    """

    job: Job
    plan: Plan
    cost: Bill
    rates: Rates
    sizes: Sequence[int]
    advised: Advised
    price: float | None = None
    spare: Spare = field(default_factory=dict)


def report_of(job: Job, rates: Rates, sizes: Sequence[int], price: float | None = None) -> Report:
    """The plan and the bill of a job, what to change for the largest size that it does not fit, and what the smallest
    that it fits leaves free.
    """
    plan = reckon(job)
    cost, fits = bill(job, plan, rates), [size for size in sizes if plan.fits(size)]
    short = [size for size in sizes if size not in fits]
    advised = {size: advise(job, plan, size) for size in [max(short)]} if short else {}
    left = spare(job, plan, min(fits)) if fits else None
    saves: Spare = {}
    if left is not None:
        words, changed, fuller = left
        if (saved := cost.step - bill(changed, fuller, rates).step) > 0:
            saves = {min(fits): (words, fuller, saved)}
    return Report(job, plan, cost, rates, sizes, advised, price, saves)


def as_json(report: Report) -> dict[str, Any]:
    job, plan = report.job, report.plan
    unknown = job.reward.unknown
    return {
        "model": job.model.name,
        "step": count_step(job),
        "phases": {name: {**parts, "total": plan.totals[name]} for name, parts in plan.phases.items()},
        "host": plan.host,
        "gathers_for_rollout": plan.gathers,
        "tightest": plan.tightest,
        "fits": {str(size): None if unknown and plan.fits(size) else plan.fits(size) for size in report.sizes},
        "rewards_of_unknown_size": unknown,
        "advice": {
            str(size): {"changes": changes, "peak": changed.peak, "fits": changed.fits(size)}
            for size, (changes, changed) in report.advised.items()
        },
        "spare": {
            str(size): {"change": words, "peak": changed.peak, "seconds_saved": seconds}
            for size, (words, changed, seconds) in report.spare.items()
        },
        "differs_from_the_pipeline": list(differences(job.config, job.policy)),
        **bill_as_json(job, plan, report.cost, report.rates, report.price),
    }


def as_text(report: Report) -> str:
    job, plan, cost, rates = report.job, report.plan, report.cost, report.rates
    console = Console(file=(text := io.StringIO()), width=100, color_system=None, highlight=False, markup=False)

    def lines(*given: str) -> None:
        for line in given:
            console.print(line, soft_wrap=True)

    lines(*summary(job, plan, report.sizes, report.advised))
    for size, (words, changed, seconds) in report.spare.items():
        saved = f"about {seconds:.3g} of {cost.step:.3g} s a step"
        lines(f"{size} GB leave room to recompute less: {words} (then {readable(changed.peak)}) saves {saved}.")
    lines(*bill_lines(job, plan, cost, report.price), "")
    console.print(step_table(job, cost, rates))
    lines(*counts(job), "")
    console.print(memory_table(plan))
    console.print(assumptions(job, rates))
    lines(*(f"Note: {words}." for words in differences(job.config, job.policy)))
    return text.getvalue().rstrip()


def summary(job: Job, plan: Plan, sizes: Sequence[int], advised: Advised) -> Iterator[str]:
    """What fits, the largest parts of the phase that needs the most, and what to change."""
    yield f"{job.model.name} on {job.gpus} needs {readable(plan.peak)} of each, during `{plan.tightest}`:"
    parts = plan.phases[plan.tightest]
    yield f"  {listed(dict(sorted(parts.items(), key=lambda part: -part[1])[:LARGEST]))}"
    for size in sizes:
        verdict = "does not fit" if not plan.fits(size) else "unknown" if job.reward.unknown else "fits"
        yield f"{size} GB: {verdict} (tensors can take {readable(room(size))})"
    if job.reward.unknown:
        yield (
            f"Nothing states the size of {', '.join(f'rewards.{name}' for name in job.reward.unknown)}: give that of "
            "all reward models on a GPU with --reward-gigabytes (0 if they are elsewhere)"
        )
    for size, (changes, changed) in advised.items():
        wanted = f"to fit {size} GB" if changed.fits(size) else f"even so it does not fit {size} GB"
        yield f"Set, {wanted} (then {readable(changed.peak)}):" if changes else f"No setting makes it fit {size} GB."
        yield from (f"  {words}" for words in changes)
        if not changed.fits(size):
            yield "Take a smaller video, or larger GPUs."


def listed(parts: Parts) -> str:
    return ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)


def counts(job: Job) -> tuple[str, ...]:
    """The numbers of a step."""
    step = count_step(job)
    latents, passes = " x ".join(map(str, step["latents"])), " + ".join(f"{each:g}" for each in step["passes"])
    return (
        f"{step['parameters']:,} parameters, {step['trained']:,} trained; latents {latents} ({job.model.source})",
        f"A step: {step['samples']} videos; groups x GPUs of each: {step['groups']} x {job.config.parallel.sequence}; "
        f"micro-batches of each group: {step['micro_batches']}",
        f"On each rank: {step['forwards']:,.0f} forwards a rollout, {len(step['passes'])} updates of {passes} passes",
    )


def memory_table(plan: Plan) -> Table:
    """Bytes by part and phase."""
    table = Table(box=box.ROUNDED, title="Memory of a rank's GPU", title_justify="left")
    table.add_column("")
    for name in plan.phases:
        table.add_column(name, justify="right")
    for part in dict.fromkeys(part for parts in plan.phases.values() for part in parts):
        table.add_row(part, *(readable(parts[part]) if part in parts else "" for parts in plan.phases.values()))
    table.add_section()
    table.add_row("together", *map(readable, plan.totals.values()))
    return table
