"""Training report of a run: one HTML file next to its samples that shows whether training helped.

It is built from metrics.jsonl, summary.json, config.yaml and samples/ of the run directory, and plays the videos in
samples/. The report omits what is missing; a malformed file is an error that names the file.

While a run trains, it writes its report now and then, and the page reloads itself. That needs no server: the file opens
from the run's folder, and from another machine by any file server, such as `python -m http.server --bind 127.0.0.1`
behind ssh's port forwarding.

    python -m bpgo_video.training.report RUN_DIR
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NotRequired

import jinja2
import yaml
from jaxtyping import Float
from markupsafe import Markup
from pydantic import Field, FiniteFloat, TypeAdapter
from torch import Tensor
from tqdm import tqdm
from typing_extensions import TypedDict

from bpgo_video import documents
from bpgo_video.cli import print_error
from bpgo_video.data.media import STRIP_HEIGHT, VideoError, read_video, strip
from bpgo_video.documents import MalformedFile
from bpgo_video.errors import InputError
from bpgo_video.files import atomic_file
from bpgo_video.training.metrics import HELDOUT, METRICS_FILE, Number, keys_with, read_metrics
from bpgo_video.training.summary import diagnose, heldout_difference, power, summary_rows, verdict

EVERY = 60.0  # seconds between the reports of an unfinished run, at least
SHARE = 0.01  # of the run's time, at most, that writing them takes
RELOAD = 30  # seconds after which the page of an unfinished run reloads itself
SHOWN_SAMPLES = 8  # the others are folded away
TABLE_ROWS = 20
TABLE_KEYS = ("reward", "trust_mean", "ratio_mean", "grad_norm", "seconds")


class FrameRow(TypedDict):
    """Scores of a sample's frames by one reward, and the frames' times in seconds."""

    times: list[FiniteFloat]
    before: NotRequired[list[FiniteFloat]]
    after: list[FiniteFloat]


class Sample(TypedDict):
    """An entry of samples/samples.json: one prompt and seed, sampled before and after training; `after` is the folder
    of the last evaluation's videos.
    """

    index: int
    prompt: str
    seed: int
    score_before: NotRequired[FiniteFloat | None]
    score_after: NotRequired[FiniteFloat | None]
    frames: NotRequired[dict[str, FrameRow]]
    after: NotRequired[Annotated[str, Field(pattern=r"^[\w-]+$")]]


class Environment(TypedDict):
    """Where a run computed; see `environment.environment`."""

    code: list[str]
    packages: dict[str, str]
    hardware: str
    device: str


class Summary(TypedDict, total=False):
    """The fields of summary.json that the report shows."""

    steps: int | None
    num_steps: int | None
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
    heldout_detectable: FiniteFloat | None
    heldout_prompts: int | None
    heldout_videos: int | None
    look: dict[str, dict[str, FiniteFloat]] | None
    alarms: dict[str, int] | None
    alarm_comparisons: int | None
    ended: str | None
    videos_generated: int | None
    seconds: dict[str, FiniteFloat]
    max_ratio_error_first_update: FiniteFloat | None
    steps_sampled_ahead: int | None
    environment: Environment | None


class LiveReport:
    """The report of an unfinished run, written every EVERY seconds, or less often if that takes more than SHARE of the
    time: drawing the curves of a long run takes seconds.
    """

    def __init__(self, run_dir: Path, every: float = EVERY) -> None:
        self.run_dir, self.every, self.due = run_dir, every, time.monotonic() + every

    def update(self, summary: Callable[[], Mapping[str, Any]]) -> None:
        """Writes the report if it is due; `summary` returns the fields of summary.json so far.

        The run goes on if that fails, since records and checkpoints do not depend on it; the reason is printed.
        """
        if (started := time.monotonic()) < self.due:
            return
        try:
            write_report(self.run_dir, summary())
        except (MalformedFile, VideoError, OSError) as error:
            tqdm.write(f"the report of the unfinished run was not written: {error}", file=sys.stderr)
        now = time.monotonic()
        self.due = now + max(self.every, (now - started) / SHARE)


def write_report(run_dir: Path, so_far: Mapping[str, Any] | None = None) -> Path:
    """Writes report.html into the run directory; returns its path.

    Args:
        so_far: the fields of summary.json of an unfinished run; None reads the file.

    Raises:
        FileNotFoundError: the directory has no metrics.jsonl.
        MalformedFile, VideoError: a file of the run has another form than expected; the message names it.
    """
    if not (run_dir / METRICS_FILE).exists():
        raise FileNotFoundError(f"{run_dir} is not a run directory: it has no {METRICS_FILE}")
    from bpgo_video.training.curves import PANELS, draw_curve  # with matplotlib, which no rank but the first needs

    records, samples = read_metrics(run_dir / METRICS_FILE), read_samples(run_dir)
    summary = read_summary(run_dir) if so_far is None else present(so_far)
    curves = {name: curve for name in PANELS if (curve := draw_curve(name, records, summary)) is not None}
    return write_page(
        run_dir / "report.html",
        "training/report.html.j2",
        scripts=("training/player.js", "training/report.js"),
        name=run_dir.resolve().name,
        running=so_far is not None,
        progress="" if so_far is None else f"step {summary['steps']:,} of {summary['num_steps']:,}",
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        reload=RELOAD,
        summary=summary,
        verdict=verdict(summary),
        power=power(summary),
        difference=heldout_difference(summary),
        rows=summary_rows(summary),
        facts_of_run=facts(summary, records),
        curves=curves,
        samples=samples,
        limits=frame_limits(samples),
        most=SHOWN_SAMPLES,
        table=numbers_table(records),
        diagnosis=diagnose(records, summary),
        config=read_config(run_dir / "config.yaml"),
    )


def write_page(path: Path, template: str, scripts: Sequence[str], **values: Any) -> Path:
    """Renders a template to `path`, atomically; returns `path`. All values are escaped, except drawings (`| svg`), and
    the page runs no other script.

    Args:
        template, scripts: their paths in the package.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bpgo_video", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda curve: Markup(curve.svg)  # drawn by curves.py, which escapes text
    script = "\n".join(files("bpgo_video").joinpath(name).read_text("utf-8") for name in scripts)
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(script=Markup(script), script_hash=script_hash, **values)
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def facts(summary: Mapping[str, Any], records: Sequence[Mapping[str, Number]]) -> list[tuple[str, str]]:
    """Code, hardware and cost of the run as (label, text)."""
    rows, environment = [], summary.get("environment")
    if environment is not None:
        rows += [("code", ", then ".join(environment["code"])), ("hardware", environment["hardware"])]
        rows += [("packages", ", ".join(" ".join(one) for one in environment["packages"].items()))]
    total, ranks = summary.get("seconds", {}).get("total"), summary.get("world_size")
    if total and ranks:
        unit = "GPU" if environment is not None and environment["device"] == "cuda" else "rank"
        rows.append(("cost", f"{total * ranks / 3600:,.2f} {unit}-hours: {ranks} x {total:,.0f} s"))
        if videos := summary.get("videos_generated"):
            rows.append(("seconds per video, all included", f"{total / videos:.3g}"))
    if seconds := [record["seconds"] for record in records if "seconds" in record]:
        rows.append(("seconds per step, median", f"{median(seconds):.3g}"))
    return rows


def present(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not null."""
    return {key: value for key, value in values.items() if value is not None}


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The recorded values of summary.json, without those that are null."""
    return present(read_json(run_dir / "summary.json", TypeAdapter(Summary), {}))


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The entries of samples.json with two more: `videos`, those before and after training that exist, and `change`,
    the score after minus that before, or None.
    """
    samples = []
    for sample in read_json(run_dir / "samples" / "samples.json", TypeAdapter(list[Sample]), []):
        folders = {"before": "before", "after": sample.get("after", "after")}
        names = {side: f"samples/{folder}/{sample['index']:03d}.mp4" for side, folder in folders.items()}
        videos = {side: shown(run_dir, name) for side, name in names.items() if (run_dir / name).exists()}
        before, after = sample.get("score_before"), sample.get("score_after")
        change = None if before is None or after is None else after - before
        samples.append({"frames": {}, **sample, "videos": videos, "change": change})
    return samples


def shown(run_dir: Path, name: str) -> dict[str, Any]:
    """A video of the run: its file and size, its first frame, and a contact sheet."""
    video = read_video(run_dir / name)[0]
    size = {"height": video.shape[2], "width": video.shape[3]}
    return {"file": name, **size, "poster": contact_sheet(video[:1]), "sheet": contact_sheet(video)}


def frame_limits(samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """The lowest and highest frame score of each reward, over all samples."""
    scores: dict[str, list[float]] = {}
    for sample in samples:
        for name, row in sample["frames"].items():
            scores.setdefault(name, []).extend([*row.get("before", []), *row["after"]])
    return {name: (min(values), max(values)) for name, values in scores.items() if values}


def contact_sheet(video: Float[Tensor, "frames 3 height width"]) -> str:
    """Frames of a video in [0, 1] side by side, as a data URI."""
    file = io.BytesIO()
    kind = "png" if video.shape[2] <= STRIP_HEIGHT else "jpeg"  # small synthetic frames compress well without loss
    strip(video).save(file, format=kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def numbers_table(records: Sequence[Mapping[str, Number]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the numbers in the curves: evenly spaced steps, the last, and all held-out evaluations."""
    heldout = keys_with(records, *HELDOUT)
    keys = [
        *heldout,
        *keys_with(records, "look/"),
        *(key for key in TABLE_KEYS if any(key in record for record in records)),
    ]
    stride = max(1, len(records) // TABLE_ROWS)
    rows = [
        [f"{record['step'] + 1:.0f}", *(f"{record[key]:.4g}" if key in record else "" for key in keys)]
        for i, record in enumerate(records)
        if i % stride == 0 or i == len(records) - 1 or any(key in record for key in heldout)
    ]
    return ["steps", *keys], rows


def read_json(path: Path, form: Any, default: Any) -> Any:
    """The content of a JSON file; `default` if there is no such file. Raises MalformedFile."""
    rule = "only a run of bpgo-video writes this file"
    return documents.read_json(form, path, rule) if path.exists() else default


def read_config(path: Path) -> str | None:
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
    parser.add_argument("run_dir", type=Path, help="the run directory (run.dir)")
    try:
        print(write_report(parser.parse_args().run_dir))
    except (InputError, VideoError, OSError) as error:
        raise SystemExit(print_error(error)) from None


if __name__ == "__main__":
    main()
