"""How did training go? One panel a quantity, drawn from the records of `metrics.jsonl` as inline SVG.

A panel is a function in PANELS that draws on the axes and says in words what it drew, or None where the
records hold nothing for it. The x axis counts finished steps; 0 is the starting policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from bpgo_video.training.drawing import SERIES, TEXT, Curve, drawn
from bpgo_video.training.metrics import Number

Records = Sequence[Mapping[str, Number]]
Summary = Mapping[str, Any]

HISTOGRAM_COLUMNS = 50
HELDOUT = {"heldout/": "", "heldout_ema/": " (average)"}  # prefixes, and how a legend tells them apart


def series(records: Records, key: str) -> tuple[list[Number], list[Number]]:
    """Finished steps and values of the records that hold `key`."""
    held = [record for record in records if key in record]
    return [record["step"] + 1 for record in held], [record[key] for record in held]


def smoothed(values: Sequence[Number]) -> np.ndarray:
    """A centred moving mean over a tenth of the run; windows shrink at both ends."""
    window = np.ones(max(1, len(values) // 10))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _words(label: str, values: Sequence[Number]) -> str:
    return f"{label} from {values[0]:.3g} to {values[-1]:.3g}"


def _line(axes: Axes, records: Records, key: str, label: str) -> str | None:
    steps, values = series(records, key)
    if not values:
        return None
    axes.plot(steps, values, color=SERIES[0], linewidth=0.8, alpha=0.4)
    axes.plot(steps, smoothed(values), color=SERIES[0], linewidth=2)
    return f"{_words(label, smoothed(values).tolist())} over {steps[-1]:,.0f} steps"


def _mean_and_extremes(axes: Axes, records: Records, name: str, label: str) -> str | None:
    steps, values = series(records, f"{name}_mean")
    if not values:
        return None
    words = _words(f"mean {label}", values)
    (low_steps, low), (_, high) = series(records, f"{name}_min"), series(records, f"{name}_max")
    if low and len(low) == len(high):
        axes.fill_between(low_steps, low, high, color=SERIES[0], alpha=0.2, linewidth=0)
        words += f"; extremes {min(low):.3g} and {max(high):.3g}"
    axes.plot(steps, values, color=SERIES[0], linewidth=2)
    axes.axhline(1.0, color=TEXT, linewidth=0.8, linestyle="--", alpha=0.6)
    return words


def heldout(axes: Axes, records: Records, summary: Summary) -> str | None:
    keys = sorted({key for record in records for key in record if key.startswith(tuple(HELDOUT))})
    keys = [key for key in keys if not key.endswith("_stderr")]
    words = []
    for i, key in enumerate(keys):
        colour, (prefix, reward) = SERIES[i % len(SERIES)], key.split("/", 1)
        name = f"{reward}{HELDOUT[prefix + '/']}"
        held = [record for record in records if key in record]
        steps, values = series(held, key)
        stderr = [record.get(f"{key}_stderr", 0.0) for record in held]
        if "heldout_before" in summary and reward == summary.get("heldout_reward", reward):
            steps, values = [0, *steps], [summary["heldout_before"], *values]
            stderr = [summary.get("heldout_before_stderr", 0.0), *stderr]
            axes.axhline(values[0], color=TEXT, linewidth=0.8, linestyle="--", alpha=0.6)
        low, high = np.subtract(values, stderr), np.add(values, stderr)
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=4, label=name)
        words.append(f"{_words(name, values)} (± {stderr[-1]:.2g})")
    if len(keys) > 1:
        axes.legend(loc="best")
    return "; ".join(words) or None


def reward(axes: Axes, records: Records, summary: Summary) -> str | None:
    return _line(axes, records, "reward", "reward")


def trained_against_heldout(axes: Axes, records: Records, summary: Summary) -> str | None:
    """Where the line turns down while it goes on to the right, the policy exploits what it is trained on."""
    steps, rewards = series(records, "reward")
    name = summary.get("heldout_reward")
    held = [(step, value) for step, value in zip(*series(records, f"heldout/{name}"), strict=True) if step in steps]
    if len(held) < 2:
        return None
    bold = dict(zip(steps, smoothed(rewards).tolist(), strict=True))
    trained, measured = [bold[step] for step, _ in held], [value for _, value in held]
    axes.plot(trained, measured, color=SERIES[0], linewidth=2, marker="o", markersize=4)
    for (step, value), reward in zip(held, trained, strict=True):
        axes.annotate(f"{step:.0f}", (reward, value), textcoords="offset points", xytext=(5, 5), fontsize=9, color=TEXT)
    axes.set_xlabel("training reward")
    return f"{_words(f'held-out {name}', measured)} while {_words('the training reward went', trained)}"


def trust(axes: Axes, records: Records, summary: Summary) -> str | None:
    return _mean_and_extremes(axes, records, "trust", "trust weight")


def trust_histogram(axes: Axes, records: Records, summary: Summary) -> str | None:
    keys = sorted({key for record in records for key in record if key.startswith("trust/hist/")})
    held = [record for record in records if all(key in record for key in keys)]
    if not keys or not held:
        return None
    stride = -(-len(held) // HISTOGRAM_COLUMNS)
    columns = [held[start : start + stride] for start in range(0, len(held), stride)]
    shares = np.array([[np.mean([record[key] for record in column]) for column in columns] for key in keys])
    edges = [column[0]["step"] + 0.5 for column in columns] + [held[-1]["step"] + 1.5]
    for row, place in np.argwhere(shares > 0):
        alpha = float(shares[row, place])
        axes.fill_between(edges[place : place + 2], row, row + 1, color=SERIES[0], alpha=alpha, linewidth=0)
    axes.set(ylim=(0, len(keys)), xlim=(edges[0], edges[-1]))
    axes.set_yticks([0, len(keys) / 2, len(keys)], ["1 - α", "1", "1 + α"])
    return f"{shares[len(keys) // 2 :].sum(axis=0).mean():.0%} of the groups at w = 1 or above"


def reliability(axes: Axes, records: Records, summary: Summary) -> str | None:
    names = sorted({key.removeprefix("icc/") for record in records for key in record if key.startswith("icc/")})
    words = []
    for i, name in enumerate(names):
        steps, values = series(records, f"icc/{name}")
        axes.plot(steps, smoothed(values), color=SERIES[i % len(SERIES)], linewidth=2, label=name)
        words.append(_words(name, smoothed(values).tolist()))
    if len(names) > 1:
        axes.legend(loc="best")
    return "; ".join(words) or None


def ratio(axes: Axes, records: Records, summary: Summary) -> str | None:
    return _mean_and_extremes(axes, records, "ratio", "probability ratio")


def grad_norm(axes: Axes, records: Records, summary: Summary) -> str | None:
    return _line(axes, records, "grad_norm", "gradient norm")


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


@dataclass(frozen=True)
class Panel:
    title: str
    caption: str
    draw: Callable[[Axes, Records, Summary], str | None]


PANELS: Mapping[str, Panel] = {
    "heldout": Panel(
        "Held-out scores",
        "Prompts that were not trained on. Band: one standard error; dashed: before training.",
        heldout,
    ),
    "reward": Panel(
        "Training reward",
        "What the policy was trained on. Thin: each step, other prompts every time; bold: moving mean.",
        reward,
    ),
    "trained_against_heldout": Panel(
        "Held-out score against training reward",
        "A point an evaluation, with its step. A line that turns down on its way to the right says that the reward is "
        "exploited.",
        trained_against_heldout,
    ),
    "trust": Panel(
        "Trust weight w",
        "How much each prompt's group counts in the update; 1 is GRPO. Line: mean; band: extremes.",
        trust,
    ),
    "trust_histogram": Panel(
        "Trust of the groups",
        "Share of each step's groups by trust weight, in ten bins; the darker, the more.",
        trust_histogram,
    ),
    "reliability": Panel(
        "Agreement of two scorings (ICC)",
        "Reliability of each reward: 1 means that a second scoring of the same videos says the same. Moving mean.",
        reliability,
    ),
    "ratio": Panel(
        "Probability ratio",
        "How far updates moved from the policy that sampled; 1 is not at all. Line: mean; band: extremes.",
        ratio,
    ),
    "grad_norm": Panel("Gradient norm", "Before clipping. Thin: each step; bold: moving mean.", grad_norm),
    "seconds": Panel("Seconds a step", "Where the time goes.", seconds),
}


def draw_curve(name: str, records: Records, summary: Summary, prefix: str = "") -> Curve | None:
    """The panel `name` of PANELS as a Curve; None where the records hold nothing for it.

    Args:
        prefix: of the ids in the figure, where a page has the panels of several runs.
    """
    panel = PANELS[name]

    def draw(axes: Axes) -> str | None:
        axes.grid(axis="y")
        alt = panel.draw(axes, records, summary)
        if not axes.get_xlabel():
            axes.set_xlabel("steps")
        return alt

    return drawn(prefix + name, panel.title, panel.caption, draw)
