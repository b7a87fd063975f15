"""Trackers: programs that show a run's records, videos and tables besides its own files. Rank 0 opens them.

A recipe's `trackers` names rows of TRACKERS, or classes of the user's own with the methods of `Tracker`. A tracker that
raises is reported once and left out from then on: the run's own files have everything.
"""

from __future__ import annotations

import io
import os
import secrets
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from pydantic_core import to_jsonable_python
from tqdm import tqdm

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.reading import to_yaml
from bpgo_video.config.sft import Recipe
from bpgo_video.data.media import read_pixels
from bpgo_video.types import Table

FINISH_SECONDS = 600.0  # that wandb may take to upload what is left, before the run goes on without it
GIF_SIZE = (320, 320)  # pixels; larger videos are scaled down for TensorBoard

Number = int | float  # an int is not a float to the type checks of the tests
Cell = str | float | Path


class Tracker(Protocol):
    """What a tracker does. Its constructor takes the recipe, and the step at which the run begins or resumes.

    Steps come in order, media and tables of a step before its record. A resumed run repeats steps from its checkpoint
    on; a tracker that has them must not show them twice.
    """

    def log(self, step: int, record: Mapping[str, Number]) -> None:
        """Show the metrics of a step."""

    def media(self, step: int, name: str, videos: Sequence[tuple[Path, str]]) -> None:
        """Show (mp4 path, caption) pairs under `name`."""

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """Show rows of the same keys; a path is a video, which may be missing."""

    def finish(self, failed: bool) -> None:
        """End the session; `failed`: by an error of the run."""


class Trackers:
    """The open trackers of a run, by name; each call goes to all of them. Without arguments there are none."""

    def __init__(self, names: Sequence[str] = (), config: Recipe | None = None, start_step: int = 0) -> None:
        self._open: dict[str, Tracker] = {}
        for name in names:
            if (tracker := self._guarded(name, "opening", TRACKERS[name], config, start_step)) is not None:
                self._open[name] = tracker

    def log(self, step: int, record: Mapping[str, Number]) -> None:
        self._each("log", step, record)

    def media(self, step: int, name: str, videos: Sequence[tuple[Path, str]]) -> None:
        self._each("media", step, name, videos)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        self._each("table", step, name, rows)

    def finish(self, failed: bool) -> None:
        self._each("finish", failed)

    def _each(self, method: str, *args: Any) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, f"{method}{args[:1]}", getattr(tracker, method), *args)

    def _guarded(self, name: str, doing: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception:  # whatever a tracker raises, such as network errors, must not end a run of days
            self._open.pop(name, None)
            tqdm.write(
                f"{traceback.format_exc()}warning: tracker {name} failed in {doing}. The run goes on without it; "
                "metrics.jsonl and samples/ have everything. It is opened again when the run resumes.",
                file=sys.stderr,
            )
            return None


def named_trackers(config: Recipe) -> list[str]:
    """Names of the recipe's trackers, each once."""
    return list(dict.fromkeys((*config.trackers, *(["wandb"] if config.wandb.project else []))))


def check_trackers(config: Recipe) -> None:
    """Check that the trackers' packages, which have their names, are installed.

    Raises:
        ConfigError: names the package and how to install it.
    """
    for name in named_trackers(config):
        try:
            ":" in name or version(name)
        except PackageNotFoundError:
            message = f"tracker {name} needs a package that is not installed: pip install 'bpgo-video[{name}]'"
            raise ConfigError(message) from None


class WandbTracker:
    """Weights & Biases; never prompts for a key. It drops steps that a resumed run repeats."""

    def __init__(self, config: Recipe, start_step: int) -> None:
        run_dir, own = Path(config.run.dir), config.wandb
        replace_unwritable_home(run_dir)
        import wandb  # slow, and not installed with the package

        mode = own.mode or "online"
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            print("wandb: no API key found, recording this run offline", file=sys.stderr)
            mode = "offline"
        self._wandb = wandb
        self._run = wandb.init(
            project=own.project,
            name=own.name,
            id=kept_id(run_dir, "wandb"),
            resume=None if mode == "offline" else "allow",
            mode=mode,
            dir=run_dir,
            config=to_jsonable_python(vars(config)),
            settings=wandb.Settings(finish_timeout=FINISH_SECONDS, finish_timeout_raises=True),
        )

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        self._run.log(dict(record), step=step)

    def media(self, step: int, name: str, videos: Sequence[tuple[Path, str]]) -> None:
        self.log(step, {name: [self._video(path, caption) for path, caption in videos]})

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        cells = [[self._video(cell) if isinstance(cell, Path) else cell for cell in row.values()] for row in rows]
        self.log(step, {name: self._wandb.Table(columns=list(rows[0]), data=cells)})

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _video(self, path: Path, caption: str | None = None) -> Any:
        """An mp4 file, which wandb copies; None if it is missing."""
        return self._wandb.Video(str(path), caption=caption, format="mp4") if path.is_file() else None


class TensorBoardTracker:
    """Event files in RUN/tensorboard. TensorBoard drops events of earlier files from the step of a resume on."""

    def __init__(self, config: Recipe, start_step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # slow, and not installed with the package
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self._writer: Any = SummaryWriter(str(Path(config.run.dir) / "tensorboard"), purge_step=start_step)
        self._writer.add_text("recipe", f"```yaml\n{to_yaml(config)}```", start_step)

    def log(self, step: int, record: Mapping[str, Number]) -> None:
        for key, value in record.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def media(self, step: int, name: str, videos: Sequence[tuple[Path, str]]) -> None:
        for index, (path, caption) in enumerate(videos):
            gif, (width, height) = animated(path)
            image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
            value = self._summary.Value(tag=f"{name}/{index}", image=image)
            self._writer.file_writer.add_summary(self._summary(value=[value]), step)
            self._writer.add_text(f"{name}/{index}", caption, step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def finish(self, failed: bool) -> None:
        self._writer.close()


class TrackioTracker:
    """trackio, with files on this machine or in a Hugging Face Space. Steps that it has already are skipped."""

    def __init__(self, config: Recipe, start_step: int) -> None:
        import trackio  # slow, and not installed with the package

        run_dir = Path(config.run.dir)
        self._trackio = trackio
        self._run = trackio.init(
            project=config.trackio.project,
            name=f"{run_dir.name}-{kept_id(run_dir, 'trackio')}",
            space_id=config.trackio.space,
            resume="allow",
            config=to_jsonable_python(vars(config)),
        )
        self._next_step = self._run._next_step  # trackio has no public name for it
        self._shown: dict[str, Any] = {}  # videos and tables of the coming record: each call of log is a row

    def log(self, step: int, record: Mapping[str, Number]) -> None:
        if step >= self._next_step:
            self._run.log({**record, **self._shown}, step=step)
        self._shown = {}

    def media(self, step: int, name: str, videos: Sequence[tuple[Path, str]]) -> None:
        self._shown |= {
            f"{name}/{index}": self._trackio.Video(str(path), caption=caption)
            for index, (path, caption) in enumerate(videos)
        }

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        data = [[str(cell) if isinstance(cell, Path) else cell for cell in row.values()] for row in rows]
        self._shown[name] = self._trackio.Table(columns=list(rows[0]), data=data)

    def finish(self, failed: bool) -> None:
        self._run.finish()


TRACKERS: Table[Callable[[Recipe, int], Tracker]] = Table(
    wandb=WandbTracker, tensorboard=TensorBoardTracker, trackio=TrackioTracker
)


def kept_id(run_dir: Path, tracker: str) -> str:
    """The run's id in a tracker, which its folder keeps, so that a resumed run continues it."""
    file = run_dir / f"{tracker}_run_id.txt"
    if not file.exists():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def animated(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A video as an animated GIF of at most GIF_SIZE, and its width and height in pixels."""
    frames, fps = read_pixels(path)
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail(GIF_SIZE)
    stream = io.BytesIO()
    images[0].save(stream, format="gif", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return stream.getvalue(), images[0].size


def replace_unwritable_home(folder: Path) -> None:
    """Redirects wandb's files to `folder` if the user's home directory is unknown or not writable."""
    with suppress(RuntimeError):  # neither HOME nor a user name, as in many containers
        if os.access(Path.home(), os.W_OK):
            return
    os.environ.setdefault("HOME", str(folder))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder / "wandb"))
    print(f"wandb: the home directory is not writable; wandb keeps its files in {folder}/wandb", file=sys.stderr)
