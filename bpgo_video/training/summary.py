"""The verdict and the numbers of `summary.json`, as a run prints them at its end.

± is the standard error over samples for these prompts; that of the difference is paired by sample. The verdict and its
interval are about other prompts, too (`bpgo_video/statistics.py`).
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.statistics import too_few

WIDTH = 110  # characters of what is printed


def heldout_difference(summary: Mapping[str, Any]) -> float | None:
    """The run's measure after less before; None where one of them is missing."""
    before, after = summary.get("heldout_before"), summary.get("heldout_after")
    return None if before is None or after is None else after - before


def measure(summary: Mapping[str, Any]) -> str:
    """What the run is measured by, in words: the first of `evaluation.rewards` on held-out prompts."""
    return f"held-out {summary.get('heldout_reward') or 'score'}"


def verdict(summary: Mapping[str, Any]) -> str | None:
    """Whether training helped, by the test of `tools/evaluate.py compare`, over prompts. None without scores."""
    difference = heldout_difference(summary)
    if difference is None:
        return None
    change = f"from {summary['heldout_before']:.3f} to {summary['heldout_after']:.3f}"
    if summary.get("heldout_shown") is None:
        return f"{measure(summary).capitalize()} went {change} (no test recorded)"
    prompts, low_high = summary["heldout_prompts"], summary.get("heldout_interval") or ()
    interval = f" [{', '.join(f'{end:+.3f}' for end in low_high)}]" if low_high else ""
    numbers = f"{change}, {difference:+.3f}{interval} over {prompts:,} prompts"
    if summary["heldout_shown"]:
        effect, direction = ("helped", "rose") if difference > 0 else ("hurt", "fell")
        return f"Training {effect}: {measure(summary)} {direction} {numbers}"
    reason = too_few(prompts, summary["heldout_measures"])
    return f"No difference shown: {measure(summary)} went {numbers}{reason and f'; {reason}'}"


def run_facts(summary: Mapping[str, Any]) -> list[str]:
    """What kind of run it was, in a few words each; what is not recorded is left out."""
    forms = {
        "algorithm": "{}",
        "steps": "{:,} steps",
        "world_size": "world size {}",
        "zero_stage": "ZeRO stage {}",
        "seed": "seed {}",
    }
    return [form.format(summary[key]) for key, form in forms.items() if summary.get(key) is not None]


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `summary.json` says, as (label, text); what is null or missing is left out."""
    summary = {key: value for key, value in summary.items() if value is not None}

    def with_stderr(score: str, key: str) -> str:
        stderr = summary.get(f"{key}_stderr")
        return score if stderr is None else f"{score} ± {stderr:.4f}"

    rows = []
    for when in ("before", "after"):
        if (score := summary.get(f"heldout_{when}")) is not None:
            rows.append((f"{measure(summary)} {when}", with_stderr(f"{score:.4f}", f"heldout_{when}")))
    if (difference := heldout_difference(summary)) is not None:
        rows.append(("paired difference", with_stderr(f"{difference:+.4f}", "heldout_difference")))
    counts = (("steps", "steps"), ("videos generated", "videos_generated"))
    rows += [(label, f"{summary[key]:,}") for label, key in counts if key in summary]
    if "max_ratio_error_first_update" in summary:
        rows.append(("ratio error, first update", f"{summary['max_ratio_error_first_update']:.3g}"))
    seconds = summary.get("seconds", {})
    parts = ("rollout", "reward", "update", "total")
    return rows + [(f"seconds, {part}", f"{seconds[part]:,.1f}") for part in parts if part in seconds]


def summary_table(summary: Mapping[str, Any], paths: Mapping[str, Path] | None = None) -> str:
    """What a run prints last: `summary_rows` as a table, verdict and diagnosis, and the `paths` it wrote, by label."""
    lines = [boxed(summary_rows(summary))]
    if words := verdict(summary):
        lines.append(words)
    for sentence in summary.get("diagnosis") or ():
        lines += textwrap.wrap(sentence, width=WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines + listed(paths or {}))


def boxed(rows: Iterable[Sequence[str]], header: Sequence[str] = ("", ""), words: int = 1, title: str = "") -> str:
    """A table as text; the first `words` columns are aligned left, the others right."""
    table = Table(box=box.ROUNDED, title=title or None, show_header=any(header))
    for place, label in enumerate(header):
        table.add_column(label, justify="left" if place < words else "right")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(table)
    return text.getvalue().rstrip()


def listed(paths: Mapping[str, Path]) -> list[str]:
    """A line for each label and its path."""
    width = max(map(len, paths), default=0)
    return [f"  {label:<{width}}  {path}" for label, path in paths.items()]
