"""Which model is better, to look at: `report.html` of a comparison, one file that opens offline in any browser."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from bpgo_video.evaluation.comparing.comparison import Compared, tables
from bpgo_video.evaluation.comparing.forest import forest
from bpgo_video.evaluation.comparing.paired import LEVEL, Effect
from bpgo_video.evaluation.comparing.side_by_side import pairs
from bpgo_video.evaluation.comparing.table import SHOWN, matched_sentences, p_text
from bpgo_video.evaluation.comparing.verdict import TRAINING_REWARD, Comparison, headline, notes, span
from bpgo_video.reports.curves import draw_curve
from bpgo_video.reports.drawing import Curve
from bpgo_video.reports.metrics import METRICS_FILE, read_metrics
from bpgo_video.reports.pages import write_page
from bpgo_video.reports.report import read_summary

REPORT_FILE = "report.html"
SCRIPT = "comparison.js"
ROLES = {"heldout": "held-out", "trained": "trained on", "video": "of the video"}
RUN_PANELS = ("heldout", "reward", "trained_against_heldout", "trust", "trust_histogram", "reliability")


@dataclass(frozen=True)
class Row:
    """A measure in the table of effects, as text; `judged` is 1 or -1 where it is shown to be better or worse."""

    measure: str
    role: str
    reference: str
    candidate: str
    difference: str
    interval: str
    p: str
    effect_size: str
    counts: str
    judged: int
    words: str


@dataclass(frozen=True)
class Bar:
    """A model's mean in one measure; `share` is where it lies between the low and the high scores of all models."""

    label: str
    text: str
    share: float


def write_report(output: Path, compared: Compared, shown: int) -> Path:
    """Writes `report.html` into `output`; its path.

    Args:
        shown: how many prompts have their videos on the page.

    Raises:
        MalformedFile, VideoError: a run's records or a video cannot be read; the message names the file.
    """
    script = files(__package__).joinpath(SCRIPT).read_text(encoding="utf-8")
    return write_page(
        output / REPORT_FILE,
        "evaluation/comparing/comparison.html.j2",
        labels=[model.scores.label for model in compared.models],
        facts=facts(compared),
        models=[(model.scores.label, model.scores.source) for model in compared.models],
        comparisons=compared.comparisons,
        headline=headline,
        notes=notes,
        rows=effect_rows,
        forests=[forest(one, f"forest-{place}") for place, one in enumerate(compared.comparisons)],
        bars=bars(compared),
        tags=tag_tables(compared),
        matched=matched_sentences(compared),
        pairs=pairs(compared, shown),
        all_prompts=len(compared.models[0].scores.prompts),
        measures={name: effect.decimals for name, effect in compared.comparisons[0].effects.items()},
        runs=run_curves(compared),
        level=LEVEL,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def facts(compared: Compared) -> list[str]:
    """How it was measured, in a few words each."""
    settings = compared.models[0].scores.settings
    way, count = settings["deployment"], len(compared.models[0].scores.prompts)
    video = way["video"]
    seeds = sorted({model.scores.settings["seed"] for model in compared.models})
    return [
        f"{count:,} prompts",
        f"{settings['samples_per_prompt']} samples of each",
        f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}",
        f"{way['num_steps']} steps",
        f"guidance {way['guidance_scale']:g}",
        f"{video['num_frames']} frames of {video['height']}x{video['width']} at {video['fps']:g} a second",
    ]


def effect_rows(one: Comparison) -> list[Row]:
    """The table of a comparison."""
    return [
        Row(
            measure=name,
            role=ROLES[role_of(one, name)],
            reference=f"{effect.mean_a:.{effect.decimals}f}",
            candidate=f"{effect.mean_b:.{effect.decimals}f}",
            difference=f"{effect.difference:+.{effect.decimals}f}",
            interval=span(effect).partition(" ")[2],
            p=p_text(effect.p_adjusted),
            effect_size=f"{effect.rank_biserial:+.2f}",
            counts=f"{effect.wins} / {effect.ties} / {effect.losses}",
            judged=effect.shown if role_of(one, name) != "video" else 0,
            words=SHOWN[effect.shown],
        )
        for name, effect in one.effects.items()
    ]


def role_of(one: Comparison, measure: str) -> str:
    return "trained" if measure == TRAINING_REWARD else one.measures[measure].role


def bars(compared: Compared) -> dict[str, list[Bar]]:
    """Each measure's means, a bar a model."""
    by_model = [(model.scores.label, tables(model.scores)) for model in compared.models]
    found = {}
    for name, effect in compared.comparisons[0].effects.items():
        everything = np.concatenate([own[name].ravel() for _, own in by_model])
        low, high = np.quantile(everything, (0.05, 0.95))
        width = (high - low) or 1.0
        found[name] = [
            Bar(
                label,
                f"{own[name].mean():.{effect.decimals}f}",
                float(np.clip((own[name].mean() - low) / width, 0.0, 1.0)),
            )
            for label, own in by_model
        ]
    return found


def tag_tables(compared: Compared) -> list[tuple[str, list[str], list[tuple[str, int, list[str]]]]]:
    """Of each candidate: its label, the measures, and for each tag its prompts and differences."""
    found = []
    for one in compared.comparisons:
        names = [name for name in one.effects if role_of(one, name) != "video"]
        lines = [
            (tag, _prompts(effects), [span(effects[name]) for name in names]) for tag, effects in one.by_tag.items()
        ]
        if lines:
            found.append((one.candidate, names, lines))
    return found


def _prompts(effects: Mapping[str, Effect]) -> int:
    return next(iter(effects.values())).prompts


def run_curves(compared: Compared) -> dict[str, list[Curve]]:
    """What the runs among the models recorded, where their folders are still there."""
    found: dict[str, list[Curve]] = {}
    for run in dict.fromkeys(model.scores.run for model in compared.models):
        if run is None or not (Path(run) / METRICS_FILE).is_file():
            continue
        records: Sequence[Mapping[str, Any]] = read_metrics(Path(run) / METRICS_FILE)
        summary = {"heldout_reward": next(iter(compared.comparisons[0].of_role("heldout"))), **read_summary(Path(run))}
        drawn = [draw_curve(name, records, summary, prefix=f"run{len(found)}-") for name in RUN_PANELS]
        found[Path(run).name] = [curve for curve in drawn if curve is not None]
    return found
