"""The pages of a comparison: tables for the terminal, and `report.html`, one file that opens offline in any browser."""

from __future__ import annotations

import base64
import hashlib
import io
import tempfile
import textwrap
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from bpgo_video.data.media import VideoError, as_bytes, read_video, write_video
from bpgo_video.evaluation.compare import Compared, Comparison
from bpgo_video.evaluation.compare_scores import Scored
from bpgo_video.evaluation.compare_verdict import headline, notes
from bpgo_video.statistics import LEVEL
from bpgo_video.training.curves import draw_curve
from bpgo_video.training.drawing import SERIES, TEXT, Curve, drawn
from bpgo_video.training.metrics import METRICS_FILE, read_metrics
from bpgo_video.training.pages import write_page
from bpgo_video.training.report import read_summary
from bpgo_video.training.summary import WIDTH, boxed

COLOURS = dict(zip(("heldout", "trained", "video"), SERIES, strict=True))
RUN_PANELS = ("heldout", "reward", "trained_against_heldout", "trust", "trust_histogram", "reliability")
LONGEST_SIDE = 320  # pixels of an embedded video; larger ones are scaled down
QUALITY = 23  # x264's constant rate factor of what is scaled


def as_table(compared: Compared) -> str:
    """Each comparison's effects, verdict and notes, and what holds at equal training reward."""
    lines = []
    for one in compared.comparisons:
        lines += [effects_table(one), *textwrap.wrap(headline(one), WIDTH)]
        for note in notes(one):
            lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join([*lines, *map(str, compared.matchings)])


def effects_table(one: Comparison) -> str:
    header = ("measure", one.reference, one.candidate, "difference [95 %]", "p (Holm)", "effect", "wins/ties/losses")
    rows = []
    for name, effect in one.effects.items():
        means = [f"{mean:.{effect.decimals}f}" for mean in (effect.mean_a, effect.mean_b)]
        counts = f"{effect.wins}/{effect.ties}/{effect.losses}"
        rows.append([name, *means, str(effect), p_text(effect.p_adjusted), f"{effect.rank_biserial:+.2f}", counts])
    return boxed(rows, header, title=f"{one.candidate} against {one.reference}")


def p_text(p: float | None) -> str:
    return "" if p is None else "< .0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"


def write_report(output: Path, compared: Compared, shown: int) -> Path:
    """Writes `report.html` into `output`; returns its path.

    Args:
        shown: number of prompts whose videos are on the page.

    Raises:
        MalformedFile, VideoError: a run's records or a video cannot be read; the message names the file.
    """
    script = files(__package__).joinpath("comparison.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    called = {own.__name__: own for own in (headline, notes, p_text, forest, bars, pairs, run_curves)}
    page = {"compared": compared, "most": shown, "level": LEVEL, "script": Markup(script), "script_hash": digest}
    return write_page(output / "report.html", "evaluation/comparing/comparison.html.j2", **page, **called)


def forest(comparison: Comparison, name: str) -> Curve | None:
    """A forest plot: differences in standard deviations of the reference's scores, the first measure on top.

    Args:
        name: unique on the page.
    """
    rows = [(measure, effect) for measure, effect in comparison.effects.items() if effect.scale > 0]

    def draw(axes: Axes) -> str | None:
        axes.axvline(0.0, color=TEXT, linewidth=0.8, linestyle="--", alpha=0.6)
        axes.grid(axis="x")
        for place, (measure, effect) in enumerate(rows):
            colour, ends = COLOURS[comparison.roles[measure]], (effect.low, effect.high)
            if None not in ends:
                axes.plot(np.array(ends) / effect.scale, [place, place], color=colour, linewidth=2)
            face, middle = colour if effect.shown else "none", effect.difference / effect.scale
            axes.plot(middle, place, color=colour, marker="o", markersize=7, markerfacecolor=face)
        axes.set_yticks(range(len(rows)), [measure for measure, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("difference in standard deviations")
        return "; ".join(f"{measure} {effect.difference / effect.scale:+.2f}" for measure, effect in rows) or None

    caption = (
        "Blue: held-out; orange: trained on; green: of the video. Lines: 95 % intervals over prompts; filled: shown by "
        "the corrected test. A measure's scale is the standard deviation of the reference's scores."
    )
    size = (5.2, 0.9 + 0.3 * len(rows))
    return drawn(name, f"{comparison.candidate} minus {comparison.reference}", caption, draw, size)


def bars(compared: Compared) -> dict[str, list[tuple[str, float, float]]]:
    """By measure, of each model: label, mean, and where the mean lies between low and high scores of all models."""
    tables = {model.scores.label: model.scores.tables() for model in compared.models}
    found = {}
    for name in compared.comparisons[0].effects:
        low, high = np.quantile(np.concatenate([own[name].ravel() for own in tables.values()]), (0.05, 0.95))
        means = {label: float(own[name].mean()) for label, own in tables.items()}
        width = float(high - low) or 1.0
        found[name] = [(label, mean, float(np.clip((mean - low) / width, 0, 1))) for label, mean in means.items()]
    return found


def run_curves(compared: Compared) -> dict[str, list[Curve]]:
    """What the runs of the models recorded, if their folders are still there."""
    found: dict[str, list[Curve]] = {}
    for run in dict.fromkeys(Path(model.scores.run) for model in compared.models if model.scores.run is not None):
        if (run / METRICS_FILE).is_file():
            records: Any = read_metrics(run / METRICS_FILE)
            summary = {"heldout_reward": next(iter(compared.comparisons[0].heldout)), **read_summary(run)}
            curves = [draw_curve(name, records, summary, prefix=f"run{len(found)}-") for name in RUN_PANELS]
            found[run.name] = [curve for curve in curves if curve is not None]
    return found


@dataclass(frozen=True)
class Clip:
    """A video to embed: base64 of an mp4, and of a JPEG of its middle frame."""

    label: str
    video: str
    poster: str
    width: int
    height: int


def pairs(compared: Compared, count: int) -> list[dict[str, Any]]:
    """The chosen prompts with every model's first video, mean scores, and the rewards' disagreement."""
    models, rows = compared.models, chosen_rows(compared, count)
    means = [{name: table.mean(axis=1).tolist() for name, table in model.scores.tables().items()} for model in models]
    apart = [disagreement(compared, candidate).tolist() for candidate in range(len(compared.comparisons))]
    return [
        {
            "row": row,
            "line": models[0].scores.prompts[row],
            "clips": [clip_of(model, row) for model in models],
            "means": [{name: values[row] for name, values in own.items()} for own in means],
            "apart": [values[row] for values in apart],
        }
        for row in rows
    ]


def prompt_means(model: Scored, measure: str) -> Float[np.ndarray, "prompts"]:
    return model.scores.table(measure).mean(axis=1)


def disagreement(compared: Compared, candidate: int) -> Float[np.ndarray, "prompts"]:
    """How far the rewards disagree about a prompt: the highest minus the lowest difference from the reference, each in
    standard deviations of the reference's scores.
    """
    one, first, second = compared.comparisons[candidate], compared.models[0], compared.models[candidate + 1]
    rewards = [name for name, one in first.scores.measures.items() if one.role != "video"]
    scales = {name: scale for name in rewards if (scale := one.effects[name].scale) > 0}
    differences = [(prompt_means(second, name) - prompt_means(first, name)) / scale for name, scale in scales.items()]
    return np.ptp(differences, axis=0) if differences else np.zeros(len(first.scores.prompts))


def chosen_rows(compared: Compared, count: int) -> list[int]:
    """In turns the biggest win, loss and disagreement of each candidate by the first held-out measure; in order."""
    first, *others = compared.models
    measure, ranked = next(iter(compared.comparisons[0].heldout)), []
    for candidate, model in enumerate(others):
        gain = prompt_means(model, measure) - prompt_means(first, measure)
        ranked += [np.argsort(-gain), np.argsort(gain), np.argsort(-disagreement(compared, candidate))]
    turns = chain.from_iterable(zip_longest(*(order.tolist() for order in ranked)))
    return sorted(list(dict.fromkeys(turns))[:count])


def clip_of(model: Scored, row: int) -> Clip:
    """A model's first video of a prompt, at most LONGEST_SIDE large.

    Raises:
        VideoError: it is missing, or cannot be read.
    """
    path = model.folder.video(row)
    if not path.is_file():
        raise VideoError(f"{path} is missing next to its scores; restore it, or name the model and a new --output")
    video, fps = read_video(path)
    data = path.read_bytes()
    if max(video.shape[2:]) > LONGEST_SIDE:
        video = scaled(video)
        with tempfile.TemporaryDirectory() as folder:
            write_video(small := Path(folder) / "video.mp4", video, fps, crf=QUALITY)
            data = small.read_bytes()
    poster, (height, width) = io.BytesIO(), video.shape[2:]
    Image.fromarray(as_bytes(video[len(video) // 2 :][:1])[0]).save(poster, format="jpeg", quality=80)
    encoded = [base64.b64encode(part).decode() for part in (data, poster.getvalue())]
    return Clip(model.scores.label, encoded[0], encoded[1], width, height)


def scaled(video: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames 3 small_height small_width"]:
    """The longer side LONGEST_SIDE, the other in proportion, both even, as 4:2:0 needs."""
    factor = LONGEST_SIDE / max(video.shape[2:])
    size = [max(2, 2 * round(side * factor / 2)) for side in video.shape[2:]]
    frames = [interpolate(frame[None], size, mode="bilinear", antialias=True) for frame in video]
    return torch.cat(frames).clamp(0, 1)
