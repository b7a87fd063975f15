"""What does a comparison say on the screen? A table for each model, and the verdict in words."""

from __future__ import annotations

import io
import textwrap

from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.evaluation.comparing.comparison import Compared
from bpgo_video.evaluation.comparing.verdict import Comparison, headline, notes, span

WIDTH = 110
SHOWN = {1: "higher", -1: "lower", 0: "no difference shown"}


def as_table(compared: Compared) -> str:
    """Each comparison's effects, verdict and notes, and what holds at equal training reward."""
    lines = []
    for one in compared.comparisons:
        lines += [_effects(one), *textwrap.wrap(headline(one), WIDTH)]
        for note in notes(one):
            lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join([*lines, *matched_sentences(compared)])


def matched_sentences(compared: Compared) -> list[str]:
    """One sentence for each run's curve and other model."""
    sentences = []
    for one in compared.matchings:
        if one.match is None:
            sentences.append(f"{one.run} never has the training reward of {one.other} between its checkpoints here.")
            continue
        differences = ", ".join(f"{name} {span(effect)}" for name, effect in one.match.effects.items())
        sentences.append(
            f"At the training reward of {one.other}, {one.match.reward:.3f}, which {one.run} has at step "
            f"{one.match.step:.0f}, {one.other} has over it in held-out measures: {differences}."
        )
    return sentences


def p_text(p: float | None) -> str:
    return "" if p is None else "< .0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"


def _effects(one: Comparison) -> str:
    table = Table(box=box.ROUNDED, title=f"{one.candidate} against {one.reference}")
    table.add_column("measure")
    for label in (one.reference, one.candidate, "difference [95 %]", "p (Holm)", "effect", "wins/ties/losses"):
        table.add_column(label, justify="right")
    for name, effect in one.effects.items():
        table.add_row(
            name,
            f"{effect.mean_a:.{effect.decimals}f}",
            f"{effect.mean_b:.{effect.decimals}f}",
            span(effect),
            p_text(effect.p_adjusted),
            f"{effect.rank_biserial:+.2f}",
            f"{effect.wins}/{effect.ties}/{effect.losses}",
        )
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(table)
    return text.getvalue().rstrip()
