"""Did training help, at a glance? `report.html` of a run: one file that needs nothing else, for any browser.

Reads `metrics.jsonl`, `summary.json`, `config.yaml` and `samples/` of the run directory; what is missing is
left out, what is malformed is an error that names the file.

    python -m bpgo_video.training.report RUN_DIR
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import yaml
from jaxtyping import Float
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict

from bpgo_video.data.media import VideoError, read_video
from bpgo_video.inference.contact_sheets import STRIP_HEIGHT, strip
from bpgo_video.training.curves import HELDOUT, PANELS, draw_curve
from bpgo_video.training.diagnosis import diagnose
from bpgo_video.training.frame_strips import CellRow, FrameRow, cell_rows
from bpgo_video.training.metrics import METRICS_FILE, MalformedFile, Number, read_metrics
from bpgo_video.training.pages import write_page
from bpgo_video.training.summary import heldout_difference, run_facts, summary_rows, verdict

SHOWN_PAIRS = 8  # the others are folded away
TABLE_ROWS = 20
TABLE_KEYS = ("reward", "trust_mean", "ratio_mean", "grad_norm", "seconds")


class Sample(TypedDict):
    """An entry of `samples/samples.json`: one prompt and seed, sampled before and after training."""

    index: int
    prompt: str
    seed: int
    score_before: NotRequired[FiniteFloat | None]
    score_after: NotRequired[FiniteFloat | None]
    frames: NotRequired[dict[str, FrameRow]]


class Summary(TypedDict, total=False):
    """What the report shows of `summary.json`; other fields are not looked at."""

    steps: int | None
    world_size: int | None
    zero_stage: int | None
    algorithm: str | None
    seed: int | None
    heldout_reward: str | None
    heldout_before: FiniteFloat | None
    heldout_after: FiniteFloat | None
    heldout_before_stderr: FiniteFloat | None
    heldout_after_stderr: FiniteFloat | None
    heldout_difference_stderr: FiniteFloat | None
    heldout_interval: list[FiniteFloat] | None
    heldout_p_value: FiniteFloat | None
    heldout_measures: int | None
    heldout_shown: int | None
    heldout_prompts: int | None
    heldout_videos: int | None
    videos_generated: int | None
    seconds: dict[str, FiniteFloat]
    max_ratio_error_first_update: FiniteFloat | None


@dataclass(frozen=True)
class Pair:
    """A sample with its contact sheets (data URIs, or None where the video is missing) and its frames' scores."""

    sample: Sample
    before: str | None
    after: str | None
    rows: Sequence[CellRow] = ()

    @property
    def change(self) -> float | None:
        before, after = self.sample.get("score_before"), self.sample.get("score_after")
        return None if before is None or after is None else after - before

    @property
    def better(self) -> bool:
        return self.change is not None and self.change > 0

    @property
    def worse(self) -> bool:
        return self.change is not None and self.change < 0


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into `run_dir` and returns its path.

    Raises:
        FileNotFoundError: `run_dir` holds no metrics.jsonl.
        MalformedFile, VideoError: one of the files is not what it should be; the message names it.
    """
    if not (run_dir / METRICS_FILE).exists():
        raise FileNotFoundError(f"{run_dir} is no run directory: it holds no {METRICS_FILE}")
    records = read_metrics(run_dir / METRICS_FILE)
    summary = read_summary(run_dir)
    curves = {name: curve for name in PANELS if (curve := draw_curve(name, records, summary)) is not None}
    return write_page(
        run_dir / "report.html",
        "reports/report.html.j2",
        name=run_dir.resolve().name,
        summary=summary,
        verdict=verdict(summary),
        facts=run_facts(summary),
        difference=heldout_difference(summary),
        rows=summary_rows(summary),
        curves=curves,
        pairs=read_pairs(run_dir / "samples"),
        shown=SHOWN_PAIRS,
        table=numbers_table(records),
        diagnosis=diagnose(records, summary),
        config=_read_config(run_dir / "config.yaml"),
    )


def read_summary(run_dir: Path) -> dict[str, Any]:
    """What `summary.json` says; what is null or missing is left out."""
    found = _read_json(run_dir / "summary.json", Summary) or {}
    return {key: value for key, value in found.items() if value is not None}


def read_pairs(folder: Path) -> list[Pair]:
    """The samples that `samples.json` lists, with the contact sheets of the videos that are there."""
    samples = _read_json(folder / "samples.json", list[Sample]) or []
    rows = cell_rows([sample.get("frames", {}) for sample in samples])
    pairs = []
    for sample, own in zip(samples, rows, strict=True):
        before, after = (_sheet_of(folder / side / f"{sample['index']:03d}.mp4") for side in ("before", "after"))
        pairs.append(Pair(sample, before, after, own))
    return pairs


def contact_sheet(video: Float[Tensor, "frames 3 height width"]) -> str:
    """The strip of a video in [0, 1], as a data URI."""
    file = io.BytesIO()
    kind = "png" if video.shape[2] <= STRIP_HEIGHT else "jpeg"  # small synthetic frames compress well without loss
    strip(video).save(file, format=kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def numbers_table(records: list[dict[str, Number]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what the curves show: evenly spaced steps, the last, every held-out evaluation."""
    heldout = sorted({key for record in records for key in record if key.startswith(tuple(HELDOUT))})
    keys = [key for key in (*heldout, *TABLE_KEYS) if any(key in record for record in records)]
    stride = max(1, len(records) // TABLE_ROWS)
    chosen = [
        record
        for i, record in enumerate(records)
        if i % stride == 0 or i == len(records) - 1 or any(key in record for key in heldout)
    ]
    cells = [[f"{record[key]:.4g}" if key in record else "" for key in keys] for record in chosen]
    steps = [f"{record['step'] + 1:.0f}" for record in chosen]
    return ["steps", *keys], [[step, *row] for step, row in zip(steps, cells, strict=True)]


def _sheet_of(path: Path) -> str | None:
    return contact_sheet(read_video(path)[0]) if path.exists() else None


def _read_json(path: Path, form: Any) -> Any:
    """The content of a JSON file as the type `form`; None where there is no such file."""
    if not path.exists():
        return None
    try:
        return TypeAdapter(form).validate_json(path.read_bytes())
    except ValidationError as error:
        raise MalformedFile(f"{path}: {error}") from error


def _read_config(path: Path) -> str | None:
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MalformedFile(f"{path}: {error}") from error
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bpgo_video.training.report", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="the run's directory (run.dir)")
    try:
        print(write_report(parser.parse_args().run_dir))
    except (FileNotFoundError, MalformedFile, VideoError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
