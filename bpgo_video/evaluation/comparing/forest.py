"""Which measures moved, and how surely? A forest plot: each difference with its interval, all on one scale."""

from __future__ import annotations

from matplotlib.axes import Axes

from bpgo_video.evaluation.comparing.paired import Effect
from bpgo_video.evaluation.comparing.verdict import Comparison
from bpgo_video.reports.drawing import SERIES, TEXT, Curve, drawn

COLOURS = dict(zip(("heldout", "trained", "video"), SERIES, strict=True))
ROW_HEIGHT, MARGIN = 0.3, 0.9  # inches


def forest(comparison: Comparison, name: str) -> Curve | None:
    """Differences in standard deviations of the reference's scores, the first measure on top; None if none varies.

    Args:
        name: unique on the page.
    """
    rows = [(measure, effect) for measure, effect in comparison.effects.items() if effect.scale > 0]

    def draw(axes: Axes) -> str | None:
        axes.axvline(0.0, color=TEXT, linewidth=0.8, linestyle="--", alpha=0.6)
        axes.grid(axis="x")
        for place, (measure, effect) in enumerate(rows):
            known = comparison.measures.get(measure)
            _one(axes, place, effect, COLOURS[known.role if known else "trained"])
        axes.set_yticks(range(len(rows)), [measure for measure, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("difference in standard deviations")
        return "; ".join(f"{measure} {effect.difference / effect.scale:+.2f}" for measure, effect in rows) or None

    return drawn(
        name,
        f"{comparison.candidate} less {comparison.reference}",
        "Blue: held-out; orange: trained on; green: of the video. Lines: 95 % intervals over prompts; filled: shown by "
        "the corrected test. A measure's scale is the standard deviation of the reference's scores.",
        draw,
        size=(5.2, MARGIN + ROW_HEIGHT * len(rows)),
    )


def _one(axes: Axes, place: int, effect: Effect, colour: str) -> None:
    if effect.low is not None and effect.high is not None:
        axes.plot([effect.low / effect.scale, effect.high / effect.scale], [place, place], color=colour, linewidth=2)
    axes.plot(
        effect.difference / effect.scale,
        place,
        color=colour,
        marker="o",
        markersize=7,
        markerfacecolor=colour if effect.shown else "none",
    )
