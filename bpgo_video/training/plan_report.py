"""A memory plan as text and as JSON: what fits, what takes the most, what to change."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.training.plan import Job, count_step, readable
from bpgo_video.training.plan_memory import Plan, room
from bpgo_video.training.plan_zero import Parts

LARGEST = 4  # parts of a phase that the summary names
Advised = dict[int, tuple[list[str], Plan]]  # gigabytes -> changes, and the plan with them


def as_json(job: Job, plan: Plan, sizes: Sequence[int], advised: Advised) -> dict[str, Any]:
    return {
        "model": job.model.name,
        "step": count_step(job),
        "phases": {name: {**parts, "total": plan.totals[name]} for name, parts in plan.phases.items()},
        "host": plan.host,
        "gathers_for_rollout": plan.gathers,
        "tightest": plan.tightest,
        "fits": {str(size): plan.fits(size) for size in sizes},
        "advice": {
            str(size): {"changes": changes, "peak": changed.peak, "fits": changed.fits(size)}
            for size, (changes, changed) in advised.items()
        },
    }


def as_text(job: Job, plan: Plan, sizes: Sequence[int], advised: Advised) -> str:
    console = Console(file=(text := io.StringIO()), width=100, color_system=None, highlight=False, markup=False)
    for line in (*summary(job, plan, sizes, advised), "", *counts(job), ""):
        console.print(line, soft_wrap=True)
    console.print(memory_table(plan))
    return text.getvalue().rstrip()


def summary(job: Job, plan: Plan, sizes: Sequence[int], advised: Advised) -> Iterator[str]:
    """What fits, the largest parts of the phase that needs the most, and what to change."""
    gpus = "1 GPU" if job.ranks == 1 else f"{job.ranks} GPUs"
    yield f"{job.model.name} on {gpus} needs {readable(plan.peak)} of each, during `{plan.tightest}`:"
    parts = plan.phases[plan.tightest]
    yield f"  {listed(dict(sorted(parts.items(), key=lambda part: -part[1])[:LARGEST]))}"
    for size in sizes:
        verdict = "fits" if plan.fits(size) else "does not fit"
        yield f"{size} GB: {verdict} (tensors can take {readable(room(size))})"
    for size, (changes, changed) in advised.items():
        wanted = f"to fit {size} GB" if changed.fits(size) else f"even so it does not fit {size} GB"
        yield f"Set, {wanted} (then {readable(changed.peak)}):" if changes else f"No setting makes it fit {size} GB."
        yield from (f"  {words}" for words in changes)
        if not changed.fits(size):
            yield "Take a smaller video, or larger GPUs."
    if plan.host:
        yield f"On the host, for each rank: {listed(plan.host)}"


def listed(parts: Parts) -> str:
    return ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)


def counts(job: Job) -> tuple[str, ...]:
    """The numbers of a step."""
    step = count_step(job)
    latents, passes = (
        separator.join(map(str, step[key])) for separator, key in ((" x ", "latents"), (" + ", "passes"))
    )
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
