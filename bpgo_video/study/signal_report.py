"""The study of signals as a table, with plots, and every number in signals.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bpgo_video.study.preregistration import SignalDemand, Signals
from bpgo_video.study.report import number, table
from bpgo_video.study.signals import Row, Value


def as_markdown(plan: Signals, rows: Sequence[Row], heading: Mapping[str, str]) -> str:
    """What each trust knows, and what it was expected to know."""
    clear, open_ = plan.noise
    parts = [
        "# What each trust knows of real groups",
        "\n".join(f"- {name}: {text}" for name, text in heading.items()),
        "Spearman: rank correlation of the group's weight with its validity, the correlation of reward and oracle over "
        "its samples. Cosine: of the weighted advantage to the oracle's, over all samples. Intervals are 95 % "
        "bootstraps over groups. The last part adds noise to the oracle's own scores, independent in each frame, with "
        "a standard "
        f"deviation of a video's mean of {clear:g} for clear prompts and {open_:g} for open ones, mean of "
        f"{plan.noise_draws} draws.",
        rows_table(rows),
        "![Signals](signals.svg)",
    ]
    if found := demands(plan, rows):
        parts += ["## What it was expected to show", demands_table(found)]
    return "\n\n".join(parts) + "\n"


def rows_table(rows: Sequence[Row]) -> str:
    lines = [
        (row.score, row.trust, text(row.spearman, 2), f"{row.cosine.value:.3f}", text(row.change, 3)) for row in rows
    ]
    return table(("score", "trust", "Spearman with validity", "cosine", "change against GRPO"), lines)


def text(value: Value | None, decimals: int) -> str:
    if value is None:
        return ""
    low, high = number(value.low, decimals), number(value.high, decimals)
    return f"{number(value.value, decimals)} [{low}, {high}]"


def demands(plan: Signals, rows: Sequence[Row]) -> list[tuple[SignalDemand, Value, bool]]:
    """The demands on rows that the table has, what was found, and whether it is as expected."""
    found = []
    for demand in plan.demands:
        for row in rows:
            value = getattr(row, demand.column)
            if (row.score, row.trust) == (demand.score, demand.trust) and value is not None:
                above = demand.above is None or value.value >= demand.above
                below = demand.below is None or value.value <= demand.below
                apart = not demand.interval or value.low > 0 or value.high < 0
                found.append((demand, value, above and below and apart))
    return found


def demands_table(found: Sequence[tuple[SignalDemand, Value, bool]]) -> str:
    lines = []
    for demand, value, met in found:
        bounds = [f">= {demand.above:g}"] if demand.above is not None else []
        bounds += [f"<= {demand.below:g}"] if demand.below is not None else []
        bounds += ["interval excludes 0"] if demand.interval else []
        what = (demand.score, demand.trust, demand.column)
        lines.append((*what, ", ".join(bounds), text(value, 3), "yes" if met else "NO"))
    return table(("score", "trust", "statistic", "expected", "found", "as expected"), lines)


def as_json(plan: Signals, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in rows],
        "demands": [
            {**asdict(demand), "found": asdict(value), "met": met} for demand, value, met in demands(plan, rows)
        ],
    }
