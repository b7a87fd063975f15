"""Plots of the study: a map of gains, intervals of the arms by regime, and of signals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from bpgo_video.files import atomic_file
from bpgo_video.study.preregistration import GRPO
from bpgo_video.study.report import Compared, number
from bpgo_video.study.signals import GRPO as GRPO_TRUST
from bpgo_video.study.signals import Row

STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "bpgo_video", "font.size": 9, "text.parse_math": False}
CLIPPED = 6.0  # %, where the map's colours end
Bar = tuple[str, float, float, float]  # label, value, low, high


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, the same file for the same numbers."""
    with atomic_file(path) as aside:
        figure.savefig(aside, format="svg", metadata={"Date": None})


def draw_gains(compared: Compared, path: Path) -> None:
    """A coloured cell with its number for each arm and regime."""
    arms = [arm for arm in compared.arms if arm != GRPO]
    cells = [[compared.cells.get((regime, arm)) for regime in compared.regimes] for arm in arms]
    values = np.array([[np.nan if cell is None else cell.mean for cell in row] for row in cells])
    with matplotlib.rc_context(STYLE):
        size = (3 + 0.75 * len(compared.regimes), 1.2 + 0.25 * len(arms))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(values, cmap="PRGn", vmin=-CLIPPED, vmax=CLIPPED, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.8 * CLIPPED else "black"
                axes.text(column, row, number(value, 1), ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(compared.regimes)), [name.replace("_", "\n") for name in compared.regimes])
        axes.set_yticks(range(len(arms)), arms)
        axes.xaxis.tick_top()
        axes.set_xlabel("gain against GRPO, % of GRPO's gain")
        save(figure, path)


def draw_intervals(compared: Compared, path: Path) -> None:
    """A panel for each regime, with the arms' means and 95 % intervals."""
    arms = [arm for arm in compared.arms if arm != GRPO]
    panels = {
        regime: [
            (arm, cell.mean, cell.low, cell.high)
            for arm in arms
            if (cell := compared.cells.get((regime, arm))) is not None
        ]
        for regime in compared.regimes
    }
    draw_panels(panels, "gain against GRPO, % of GRPO's gain", path)


def draw_signals(rows: Sequence[Row], path: Path) -> None:
    """The change of the cosine against GRPO, a panel for each score."""
    panels: dict[str, list[Bar]] = {}
    for row in rows:
        if row.trust != GRPO_TRUST:
            panels.setdefault(row.score, []).append((row.trust, row.change.value, row.change.low, row.change.high))
    for score, bars in panels.items():
        panels[score] = [
            next((bar for bar in bars if bar[0] == name), (name, np.nan, np.nan, np.nan))
            for name in dict.fromkeys(bar[0] for of in panels.values() for bar in of)
        ]
    draw_panels(panels, "change of the cosine to the oracle's advantage", path)


def draw_panels(panels: dict[str, list[Bar]], label: str, path: Path, columns: int = 4) -> None:
    """Panels of values with intervals, and a line at 0."""
    rows = -(-len(panels) // columns)
    longest = max(map(len, panels.values()))
    columns = min(columns, len(panels))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 3.2 * columns, rows * (0.9 + 0.18 * longest)), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, bars) in zip(grid.flat, panels.items(), strict=False):
            names, values, lows, highs = zip(*bars, strict=True)
            errors = np.nan_to_num(np.array([np.subtract(values, lows), np.subtract(highs, values)])).clip(min=0)
            axes.axvline(0, color="black", linewidth=0.6)
            axes.errorbar(values, range(len(bars)), xerr=errors, fmt="o", markersize=3, color="#3a6ea5", elinewidth=1.2)
            axes.set_yticks(range(len(bars)), names)
            axes.set_ylim(len(bars) - 0.5, -0.5)
            axes.set_title(title.replace("_", " "), fontsize=10)
            axes.grid(axis="x", alpha=0.2)
        figure.supxlabel(label, fontsize=9)
        save(figure, path)
