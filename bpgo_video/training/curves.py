"""Training curves: one panel per quantity, drawn from the records of metrics.jsonl as inline SVG.

Figures take their colours from the page: text is its currentColor, series are its --c1, --c2, --c3. The x axis counts
finished steps; 0 is the starting policy.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bpgo_video.training.metrics import HELDOUT, Number, keys_with

Records = Sequence[Mapping[str, Number]]
Summary = Mapping[str, Any]

HISTOGRAM_COLUMNS = 50
POINTS = 1000  # of a curve, at most
EXTREMES: Any = {"_min": min, "_max": max}
TEXT, SERIES = "#0a0b00", ("#0a0b01", "#0a0b02", "#0a0b03")  # placeholders: matplotlib does not accept CSS variables
THEME = {TEXT: "currentColor"} | {colour: f"var(--c{i})" for i, colour in enumerate(SERIES, start=1)}
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold any character
    "svg.hashsalt": "bpgo_video",  # the same run gives the same file
    "font.family": "sans-serif",
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": TEXT,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}
DASHED: Any = {"color": TEXT, "linewidth": 0.8, "linestyle": "--", "alpha": 0.6}
MARKED: Any = {"linewidth": 2, "marker": "o", "markersize": 4}


@dataclass(frozen=True)
class Curve:
    """A finished figure: `svg` is markup to inline, `alt` describes in words what it shows."""

    title: str
    caption: str
    svg: str
    alt: str


def draw_figure(
    name: str, title: str, caption: str, draw: Callable[[Axes], str | None], size: tuple[float, float] = (5.2, 2.7)
) -> Curve | None:
    """A figure as a Curve; None if there is nothing to draw.

    Args:
        name: prefix of the ids in the SVG; unique on the page.
        draw: draws on the axes and describes the drawing in words; None if there is nothing to draw.
        size: inches; text is 11 points high.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        alt = draw(figure.add_subplot())
        if alt is None:
            return None
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    document = file.getvalue()
    body = re.sub(r"<metadata>.*?</metadata>", "", document[document.index("<svg") :], flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]*)"', body)
    assert view_box is not None  # matplotlib always writes one
    head = f'<svg viewBox="{view_box[1]}" role="img" aria-label="{html.escape(f"{title}: {alt}")}">'
    body = re.sub(r"<svg[^>]*>", lambda _: head, body, count=1, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for placeholder, colour in THEME.items():
        body = body.replace(placeholder, colour)
    return Curve(title, caption, body, alt)


def series(records: Records, key: str) -> tuple[list[Number], list[Number]]:
    """Finished steps and values of the records that have `key`.

    More than POINTS become means of neighbouring ones, or for `_min` and `_max` their extreme, at the last one's step.
    """
    chosen = [record for record in records if key in record]
    steps, values = [record["step"] + 1 for record in chosen], [record[key] for record in chosen]
    stride, merged = -(-len(values) // POINTS), EXTREMES.get(key[-4:], fmean)
    if stride <= 1:
        return steps, values
    parts = [slice(start, start + stride) for start in range(0, len(values), stride)]
    return [steps[part][-1] for part in parts], [merged(values[part]) for part in parts]


def smoothed(values: Sequence[Number]) -> np.ndarray:
    """A centred moving mean over a tenth of the run; windows shrink at both ends."""
    window = np.ones(max(1, len(values) // 10))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def change(label: str, values: Sequence[Number]) -> str:
    return f"{label} from {values[0]:.3g} to {values[-1]:.3g}"


def line(key: str, label: str, axes: Axes, records: Records, summary: Summary) -> str | None:
    """Each step thin, the moving mean bold."""
    steps, values = series(records, key)
    if not values:
        return None
    axes.plot(steps, values, color=SERIES[0], linewidth=0.8, alpha=0.4)
    axes.plot(steps, smoothed(values), color=SERIES[0], linewidth=2)
    return f"{change(label, smoothed(values).tolist())} over {steps[-1]:,.0f} steps"


def mean_and_extremes(key: str, label: str, axes: Axes, records: Records, summary: Summary) -> str | None:
    """KEY_mean as a line, KEY_min to KEY_max as a band."""
    steps, values = series(records, f"{key}_mean")
    if not values:
        return None
    words = change(f"mean {label}", values)
    (low_steps, low), (_, high) = series(records, f"{key}_min"), series(records, f"{key}_max")
    if low and len(low) == len(high):
        axes.fill_between(low_steps, low, high, color=SERIES[0], alpha=0.2, linewidth=0)
        words += f"; extremes {min(low):.3g} and {max(high):.3g}"
    axes.plot(steps, values, color=SERIES[0], linewidth=2)
    axes.axhline(1.0, **DASHED)
    return words


def heldout(axes: Axes, records: Records, summary: Summary) -> str | None:
    keys = [key for key in keys_with(records, *HELDOUT) if not key.endswith("_stderr")]
    words = []
    for i, key in enumerate(keys):
        colour, (prefix, reward) = SERIES[i % len(SERIES)], key.split("/", 1)
        name = f"{reward}{HELDOUT[prefix + '/']}"
        steps, values = series(records, key)
        stderr = [record.get(f"{key}_stderr", 0.0) for record in records if key in record]
        if "heldout_before" in summary and reward == summary.get("heldout_reward", reward):
            steps, values = [0, *steps], [summary["heldout_before"], *values]
            stderr = [summary.get("heldout_before_stderr", 0.0), *stderr]
            axes.axhline(values[0], **DASHED)
        low, high = np.subtract(values, stderr), np.add(values, stderr)
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, values, color=colour, label=name, **MARKED)
        words.append(f"{change(name, values)} (± {stderr[-1]:.2g})")
    if len(keys) > 1:
        axes.legend(loc="best")
    return "; ".join(words) or None


def look(axes: Axes, records: Records, summary: Summary) -> str | None:
    words, before = [], summary.get("look") or {}
    for i, key in enumerate(keys_with(records, "look/")):
        steps, values = series(records, key)
        if key in before:
            steps, values = [0, *steps], [before[key]["before"], *values]
        axes.plot(steps, values, color=SERIES[i % len(SERIES)], label=key.removeprefix("look/"), **MARKED)
        words.append(change(key.removeprefix("look/"), values))
    if words:
        axes.legend(loc="best")
    return "; ".join(words) or None


def trained_against_heldout(axes: Axes, records: Records, summary: Summary) -> str | None:
    """If the line turns down while it continues to the right, the policy exploits its training reward."""
    steps, rewards = series(records, "reward")
    name = summary.get("heldout_reward")
    evaluated, measured = series(records, f"heldout/{name}")
    if len(evaluated) < 2 or not steps:
        return None
    trained = np.interp(evaluated, steps, smoothed(rewards)).tolist()
    axes.plot(trained, measured, color=SERIES[0], **MARKED)
    for step, value, reward in zip(evaluated, measured, trained, strict=True):
        axes.annotate(f"{step:.0f}", (reward, value), textcoords="offset points", xytext=(5, 5), fontsize=9, color=TEXT)
    axes.margins(0.1)  # room for the labels
    axes.set_xlabel("training reward")
    return f"{change(f'held-out {name}', measured)} while {change('the training reward went', trained)}"


def trust_histogram(axes: Axes, records: Records, summary: Summary) -> str | None:
    keys = keys_with(records, "trust/hist/")
    chosen = [record for record in records if all(key in record for key in keys)]
    if not keys or not chosen:
        return None
    stride = -(-len(chosen) // HISTOGRAM_COLUMNS)
    columns = [chosen[start : start + stride] for start in range(0, len(chosen), stride)]
    shares = np.array([[np.mean([record[key] for record in column]) for column in columns] for key in keys])
    edges = [column[0]["step"] + 0.5 for column in columns] + [chosen[-1]["step"] + 1.5]
    for row, column in np.argwhere(shares > 0):
        alpha = float(shares[row, column])
        axes.fill_between(edges[column : column + 2], row, row + 1, color=SERIES[0], alpha=alpha, linewidth=0)
    axes.set(ylim=(0, len(keys)), xlim=(edges[0], edges[-1]))
    axes.set_yticks([0, len(keys) / 2, len(keys)], ["1 - α", "1", "1 + α"])
    return f"{shares[len(keys) // 2 :].sum(axis=0).mean():.0%} of the groups at w = 1 or above"


def lines(prefix: str, axes: Axes, records: Records, summary: Summary) -> str | None:
    """The moving mean of each key with a prefix, named by the rest of the key."""
    words = []
    for i, key in enumerate(keys := keys_with(records, prefix)):
        steps, values = series(records, key)
        name, style = key.removeprefix(prefix), "-" if i < len(SERIES) else "--"
        axes.plot(steps, smoothed(values), color=SERIES[i % len(SERIES)], linewidth=2, linestyle=style, label=name)
        words.append(change(name, smoothed(values).tolist()))
    if len(keys) > 1:
        axes.legend(loc="best")
    return "; ".join(words) or None


def seconds(axes: Axes, records: Records, summary: Summary) -> str | None:
    steps, total = series(records, "seconds")
    if not total:
        return None
    parts = [part for part in ("rollout", "reward", "update") if series(records, f"seconds/{part}")[0] == steps]
    if parts:
        stacks = [series(records, f"seconds/{part}")[1] for part in parts]
        axes.stackplot(steps, *stacks, labels=parts, colors=SERIES[: len(parts)], alpha=0.6, linewidth=0)
    axes.plot(steps, total, color=TEXT, linewidth=1, label="whole step")
    axes.set_ylim(bottom=0, top=1.25 * float(np.quantile(total, 0.98)))
    axes.legend(loc="upper center", ncols=4, columnspacing=1, handlelength=1.2)
    return f"a step takes {np.median(total):.3g} seconds (median)"


# A panel draws on the axes and describes the drawing in words; None if the records have nothing to draw.
Panel = tuple[str, str, Callable[[Axes, Records, Summary], str | None]]  # title, caption, function
PANELS: Mapping[str, Panel] = {
    "heldout": ("Held-out scores", "Band: one standard error; dashed: before training.", heldout),
    "reward": ("Training reward", "Thin: each step; bold: moving mean.", partial(line, "reward", "reward")),
    "trained_against_heldout": (
        "Held-out score against training reward",
        "One point per evaluation, labelled by its step. A line that turns down on its way to the right shows that the "
        "policy exploits its training reward.",
        trained_against_heldout,
    ),
    "look": (
        "How held-out videos look",
        "Mean luma, share of clipped highlights, saturation and contrast, whatever the videos show. None has a good "
        "direction: a drift may be exploitation of the reward.",
        look,
    ),
    "trust": (
        "Trust weight w",
        "Weight of each prompt's group in the update; 1 is GRPO. Line: mean; band: extremes.",
        partial(mean_and_extremes, "trust", "trust weight"),
    ),
    "trust_kinds": (
        "Trust of kinds of prompts",
        "Mean weight of the prompts with each of the most frequent tags. Moving mean.",
        partial(lines, "trust_kind/"),
    ),
    "trust_validity": (
        "Does trust know?",
        "Rank correlation, over a step's groups, of the trust in a reward and its agreement with a watched reward. "
        "Above 0: trusted groups are the valid ones. Moving mean.",
        partial(lines, "trust_validity/"),
    ),
    "trust_histogram": (
        "Trust of the groups",
        "Share of each step's groups by trust weight, in ten bins; darker means more groups.",
        trust_histogram,
    ),
    "reliability": (
        "Agreement of scorings (ICC)",
        "Reliability of each reward: 1 means that scoring the same videos again gives the same scores. Moving mean.",
        partial(lines, "icc/"),
    ),
    "ratio": (
        "Probability ratio",
        "Distance of the updated policy from the one that sampled; 1 is no distance. Line: mean; band: extremes.",
        partial(mean_and_extremes, "ratio", "probability ratio"),
    ),
    "grad_norm": ("Gradient norm", "Before clipping. Bold: moving mean.", partial(line, "grad_norm", "gradient norm")),
    "seconds": ("Seconds per step", "Where the time goes.", seconds),
}


def draw_curve(name: str, records: Records, summary: Summary, prefix: str = "") -> Curve | None:
    """A panel of PANELS as a Curve; None if the records have nothing for it.

    Args:
        prefix: of the ids in the figure, for pages with the panels of several runs.
    """
    title, caption, panel = PANELS[name]

    def draw(axes: Axes) -> str | None:
        axes.grid(axis="y")
        alt = panel(axes, records, summary)
        if not axes.get_xlabel():
            axes.set_xlabel("steps")
        return alt

    return draw_figure(prefix + name, title, caption, draw)
