"""How does a figure become part of a page? As inline SVG in the page's colours, with words for who cannot see it.

Figures take their colours from the page: text is its currentColor, series are its --c1, --c2, --c3.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEXT, SERIES = "#0a0b00", ("#0a0b01", "#0a0b02", "#0a0b03")  # stand-ins: matplotlib knows no CSS
THEME = {TEXT: "currentColor"} | {colour: f"var(--c{i})" for i, colour in enumerate(SERIES, start=1)}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bpgo_video",  # the same run gives the same file
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": TEXT,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """A drawn panel: `svg` is markup to inline, `alt` says in words what it shows."""

    title: str
    caption: str
    svg: str
    alt: str


def drawn(
    name: str, title: str, caption: str, draw: Callable[[Axes], str | None], size: tuple[float, float] = (5.2, 2.7)
) -> Curve | None:
    """A figure as a Curve.

    Args:
        name: unique on the page.
        draw: draws and says in words what it drew; None where there is nothing to draw.
        size: inches; text is 11 points high.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        alt = draw(axes)
        if alt is None:
            return None
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return Curve(title, caption, inline_svg(file.getvalue(), name, alt=f"{title}: {alt}"), alt)


def inline_svg(document: str, prefix: str, alt: str) -> str:
    """A matplotlib SVG as markup for a page of several: the page's colours, own ids, nothing fetched."""
    body = document[document.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]*)"', body)
    assert view_box is not None  # matplotlib always writes one
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg viewBox="{view_box[1]}" role="img" aria-label="{label}">'
    body = re.sub(r"<svg[^>]*>", lambda _: head, body, count=1, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    for stand_in, colour in THEME.items():
        body = body.replace(stand_in, colour)
    return body
