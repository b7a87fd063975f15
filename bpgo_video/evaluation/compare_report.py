"""Report of a comparison: tables for the terminal, and report.html, one self-contained file for any browser."""

from __future__ import annotations

import base64
import io
import tempfile
import textwrap
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from bpgo_video.data.media import VideoError, as_bytes, read_video, write_video
from bpgo_video.evaluation.comparison import Compared, Comparison, ModelScores, video_path
from bpgo_video.statistics import LEVEL
from bpgo_video.training.curves import DASHED, SERIES, Curve, draw_curve, draw_figure
from bpgo_video.training.metrics import METRICS_FILE, read_metrics
from bpgo_video.training.report import read_summary, write_page
from bpgo_video.training.summary import WIDTH, boxed

COLOURS = dict(zip(("heldout", "trained", "video"), SERIES, strict=True))
RUN_PANELS = ("heldout", "reward", "trained_against_heldout", "trust", "trust_kinds", "trust_histogram", "reliability")
LONGEST_SIDE = 320  # pixels of an embedded video; larger ones are scaled down
QUALITY = 23  # x264's constant rate factor for scaled videos
CAPTION = (
    "Blue: held-out; orange: trained on; green: statistics of the videos. Lines: 95 % intervals over prompts; filled: "
    "shown by the corrected test. The unit is the standard deviation of the reference's scores."
)


def as_table(compared: Compared) -> str:
    """The effects, verdict and notes of each comparison, and the comparisons at equal training reward."""
    lines = []
    for one in compared.comparisons:
        lines += [effects_table(one), *textwrap.wrap(one.verdict, WIDTH)]
    for note in compared.notes:
        lines += textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join([*lines, *map(str, compared.matchings)])


def effects_table(one: Comparison) -> str:
    header = ("measure", one.reference, one.candidate, "difference [95 %]", "corrected p", "effect", "wins/ties/losses")
    rows = []
    for name, effect in one.effects.items():
        means = [f"{mean:.{effect.decimals}f}" for mean in (effect.mean_a, effect.mean_b)]
        counts = f"{effect.wins}/{effect.ties}/{effect.losses}"
        rows.append([name, *means, str(effect), p_text(effect.p_adjusted), f"{effect.rank_biserial:+.2f}", counts])
    return boxed(rows, header, title=f"{one.candidate} against {one.reference}")


def p_text(p: float | None) -> str:
    return "" if p is None else "< .0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"


def write_report(output: Path, compared: Compared, shown: int) -> Path:
    """Writes report.html into `output`; returns its path.

    Args:
        shown: number of prompts with videos on the page.

    Raises:
        MalformedFile, VideoError: a run's records or a video cannot be read; the message names the file.
    """
    return write_page(
        output / "report.html",
        "evaluation/comparison.html.j2",
        scripts=("training/player.js", "evaluation/comparison.js"),
        compared=compared,
        level=LEVEL,
        examples=[example(compared, row) for row in chosen_rows(compared, shown)],
        run_curves=run_curves(compared),
        bars={name: bars(compared, name) for name in compared.comparisons[0].effects},
        forest=forest,
        p_text=p_text,
    )


def forest(comparison: Comparison, name: str) -> Curve | None:
    """A forest plot: differences in standard deviations of the reference's scores, the first measure on top.

    Args:
        name: unique on the page.
    """
    rows = [(measure, effect) for measure, effect in comparison.effects.items() if effect.scale > 0]

    def draw(axes: Axes) -> str | None:
        axes.axvline(0.0, **DASHED)
        axes.grid(axis="x")
        for y, (measure, effect) in enumerate(rows):
            colour, ends = COLOURS[comparison.roles[measure]], (effect.low, effect.high)
            if None not in ends:
                axes.plot(np.array(ends) / effect.scale, [y, y], color=colour, linewidth=2)
            face, middle = colour if effect.shown else "none", effect.difference / effect.scale
            axes.plot(middle, y, color=colour, marker="o", markersize=7, markerfacecolor=face)
        axes.set_yticks(range(len(rows)), [measure for measure, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("difference in standard deviations")
        return "; ".join(f"{measure} {effect.difference / effect.scale:+.2f}" for measure, effect in rows) or None

    size = (5.2, 0.9 + 0.3 * len(rows))
    return draw_figure(name, f"{comparison.candidate} minus {comparison.reference}", CAPTION, draw, size)


def bars(compared: Compared, measure: str) -> list[tuple[str, float, float]]:
    """Label and mean of each model, and the position of the mean between the 5th (0) and 95th (1) percentile of all
    models' scores.
    """
    tables = [model.table(measure) for model in compared.models]
    low, high = np.quantile(np.concatenate([table.ravel() for table in tables]), (0.05, 0.95))
    width = float(high - low) or 1.0
    means = [float(table.mean()) for table in tables]
    return [
        (model.label, mean, float(np.clip((mean - low) / width, 0, 1)))
        for model, mean in zip(compared.models, means, strict=True)
    ]


def run_curves(compared: Compared) -> dict[str, list[Curve]]:
    """The training curves of the models' runs, if their folders still exist."""
    curves: dict[str, list[Curve]] = {}
    for run in dict.fromkeys(Path(model.run) for model in compared.models if model.run is not None):
        if (run / METRICS_FILE).is_file():
            records = read_metrics(run / METRICS_FILE)
            summary = {"heldout_reward": next(iter(compared.comparisons[0].heldout)), **read_summary(run)}
            drawn = [draw_curve(name, records, summary, prefix=f"run{len(curves)}-") for name in RUN_PANELS]
            curves[run.name] = [curve for curve in drawn if curve is not None]
    return curves


def example(compared: Compared, row: int) -> dict[str, Any]:
    """A prompt with every model's first video, mean scores by measure, and the disagreement of the rewards."""
    models = compared.models
    return {
        "row": row,
        "line": models[0].prompts[row],
        "clips": [embedded(model, row) for model in models],
        "means": [{name: float(model.table(name)[row].mean()) for name in model.roles} for model in models],
        "apart": [float(disagreement(compared, model)[row]) for model in models[1:]],
    }


def disagreement(compared: Compared, candidate: ModelScores) -> Float[np.ndarray, "prompts"]:
    """Disagreement of the rewards about each prompt: the highest minus the lowest difference from the reference, each
    in standard deviations of the reference's scores.
    """
    reference, effects = compared.models[0], compared.comparisons[0].effects  # whose scale is the reference's
    differences = [
        (candidate.prompt_means(name) - reference.prompt_means(name)) / effects[name].scale
        for name, measure in reference.measures.items()
        if measure.role != "video" and effects[name].scale > 0
    ]
    return np.ptp(differences, axis=0) if differences else np.zeros(len(reference.prompts))


def chosen_rows(compared: Compared, count: int) -> list[int]:
    """The biggest wins, losses and disagreements of each candidate in turn, by the first held-out measure; sorted."""
    reference, *others = compared.models
    measure, rankings = next(iter(compared.comparisons[0].heldout)), []
    for candidate in others:
        gain = candidate.prompt_means(measure) - reference.prompt_means(measure)
        rankings += [np.argsort(-gain), np.argsort(gain), np.argsort(-disagreement(compared, candidate))]
    turns = chain.from_iterable(zip_longest(*(ranking.tolist() for ranking in rankings)))
    return sorted(list(dict.fromkeys(turns))[:count])


def embedded(model: ModelScores, row: int) -> dict[str, Any]:
    """A model's first video of a prompt, at most LONGEST_SIDE large: base64 of the mp4 (`video`) and of a JPEG of its
    middle frame (`poster`).

    Raises:
        VideoError: it is missing or cannot be read.
    """
    path = video_path(model.folder, row)
    if not path.is_file():
        raise VideoError(f"{path} is missing next to its scores; restore it, or measure the model into a new --output")
    video, fps = read_video(path)
    data = path.read_bytes()
    if max(video.shape[2:]) > LONGEST_SIDE:
        video = scaled(video)
        with tempfile.TemporaryDirectory() as folder:
            write_video(small := Path(folder) / "video.mp4", video, fps, crf=QUALITY)
            data = small.read_bytes()
    poster, (height, width) = io.BytesIO(), video.shape[2:]
    Image.fromarray(as_bytes(video[len(video) // 2 :][:1])[0]).save(poster, format="jpeg", quality=80)
    encoded = {name: base64.b64encode(part).decode() for name, part in (("video", data), ("poster", poster.getvalue()))}
    return {"label": model.label, "width": width, "height": height, **encoded}


def scaled(video: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames 3 small_height small_width"]:
    """The longer side becomes LONGEST_SIDE, the other one in proportion; both are even, as 4:2:0 requires."""
    factor = LONGEST_SIDE / max(video.shape[2:])
    size = [max(2, 2 * round(side * factor / 2)) for side in video.shape[2:]]
    frames = [interpolate(frame[None], size, mode="bilinear", antialias=True) for frame in video]
    return torch.cat(frames).clamp(0, 1)
