"""What does a run write while it goes? One JSON line a step, a progress bar, and wandb where asked.

Only rank 0 writes; every rank calls, so that a value that is no number stops all of them at the same step.
Values come reduced: see `reduce_metrics`. A held-out evaluation belongs to the record of the step after whose
update it was made.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
import torch.distributed as dist
from pydantic import FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor
from tqdm import tqdm

from bpgo_video.atomic import atomic_file
from bpgo_video.config.run import WandbConfig
from bpgo_video.training.wandb_run import Cell, WandbRun

METRICS_FILE = "metrics.jsonl"
FRAMES_FILE = "samples/frame_scores.jsonl"
QUIET_SECONDS = 10.0  # between two progress lines where there is no terminal
RECORD = TypeAdapter(dict[str, FiniteFloat])


@dataclass(frozen=True)
class Keys:
    """What every record of a run must have, and how the progress line tells some of it."""

    required: tuple[str, ...]
    shown: Mapping[str, str]


ROLLOUTS = Keys(
    ("reward", "trust_mean", "grad_norm", "ratio_mean", "seconds"),
    {"reward": "reward {:.4f}", "trust_mean": "trust {:.3f}"},
)
MATCHING = Keys(("loss", "grad_norm", "seconds"), {"loss": "loss {:.4f}"})

Number = int | float  # an int is no float to the type checks of the tests


class MalformedFile(ValueError):
    """A file of the run directory that cannot be read as what it should be; the message names it."""


def reduce_metrics(values: Mapping[str, Tensor | Number], group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Means over the ranks of `group`, in one all_reduce; keys ending in `_max` or `_min` are extremes.

    Every rank must bring the same keys. Each rank fills its own row of a ranks x keys table of zeros: the sum
    over ranks is the table, and every rank takes the same statistics of it, in float64.
    """
    keys = sorted(values)
    row = torch.tensor([float(values[key]) for key in keys], dtype=torch.float64)
    if not (dist.is_available() and dist.is_initialized()):
        return dict(zip(keys, row.tolist(), strict=True))
    table = torch.zeros(dist.get_world_size(group), len(keys), dtype=torch.float64)
    table[dist.get_rank(group)] = row
    table = table.to(_communication_device(group))
    dist.all_reduce(table, group=group)
    columns = zip(keys, table.cpu().unbind(1), strict=True)
    return {key: _statistic(key, column).item() for key, column in columns}


def _statistic(key: str, column: Tensor) -> Tensor:
    if key.endswith("_max"):
        return column.amax()
    return column.amin() if key.endswith("_min") else column.mean()


def _communication_device(group: dist.ProcessGroup | None) -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None or dist.get_backend(group) == "gloo" else accelerator


class RunLog:
    """The log of one run, from `start_step` to `total_steps`; a context manager, opened on every rank.

    Opening cuts the records of `start_step` and later off existing files, atomically: a resumed run makes them again.
    """

    def __init__(
        self,
        run_dir: Path,
        wandb: WandbConfig | None,
        total_steps: int,
        start_step: int = 0,
        config: Mapping[str, Any] | None = None,
        keys: Keys = ROLLOUTS,
    ) -> None:
        self._run_dir, self._next_step, self._keys = run_dir, start_step, keys
        self._later: Mapping[str, Number] = {}
        self._file: TextIO | None = None
        self._wandb: WandbRun | None = None
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        truncate_metrics(path, start_step)
        truncate_frames(run_dir / FRAMES_FILE, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._progress = _Progress(total_steps, start_step, keys.shown)
        if wandb is not None and wandb.project is not None:
            self._wandb = WandbRun(run_dir, wandb, config)

    def log(self, step: int, values: Mapping[str, Tensor | Number]) -> None:
        """Appends the record of `step`: finite, later than the last one, with the required keys.

        Raises:
            ValueError: on every rank, before anything is written, naming the step and the key.
        """
        record = self._checked(step, {**values, **self._later})
        self._next_step, self._later = step + 1, {}
        if self._file is None:
            return
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint that outlives a loss of power must find its records
        if self._wandb is not None:
            self._wandb.log(step, {key: value for key, value in record.items() if key != "step"})
        self._progress.update(step, record)

    def later(self, told: str, values: Mapping[str, Number]) -> None:
        """Tell what came after a record, and put its values into the next one."""
        self._later = values
        if self._file is not None:
            tqdm.write(told, file=sys.stderr)

    def frames(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends to FRAMES_FILE: what of a held-out evaluation is no number a step. Each line has a `step`."""
        if self._file is None or not lines:
            return
        path = self._run_dir / FRAMES_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)

    def media(self, step: int, name: str, videos: Sequence[tuple[Path, str]]) -> None:
        """Sends (mp4 path, caption) pairs to wandb under `name`; nothing where wandb is not configured."""
        if self._wandb is not None:
            self._wandb.media(step, name, videos)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """Sends a table of these rows to wandb under `name`; a path is shown as the video that it names."""
        if self._wandb is not None and rows:
            self._wandb.table(step, name, rows)

    def close(self, failed: bool = False) -> None:
        if self._file is None or self._file.closed:
            return
        self._file.close()
        self._progress.close()
        if self._wandb is not None:
            self._wandb.finish(failed)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _checked(self, step: int, values: Mapping[str, Tensor | Number]) -> dict[str, Number]:
        if step < self._next_step:
            raise ValueError(f"step {step} is logged already: the next record is of step {self._next_step}")
        if missing := [key for key in self._keys.required if key not in values]:
            raise ValueError(f"the record of step {step} lacks {', '.join(missing)}")
        record = {key: float(value) for key, value in values.items() if key != "step"}
        for key, value in record.items():
            if not math.isfinite(value):
                raise ValueError(f"metric {key!r} is {value} at step {step}: only finite values are logged")
        return {"step": step, **record}


def read_metrics(path: Path) -> list[dict[str, Number]]:
    """The records of a `metrics.jsonl`. A last line that a kill cut short is left out.

    Raises:
        MalformedFile: naming file and line, where it is no JSON object of finite numbers with a step.
    """
    return [record for _, record in _lines(path)]


def truncate_metrics(path: Path, start_step: int) -> None:
    """Leaves only the records before `start_step`; the old file stands until the new one is whole."""
    if not path.exists():
        return
    kept = [line for line, record in _lines(path) if record["step"] < start_step]
    with atomic_file(path) as aside:
        aside.write_text("".join(kept), encoding="utf-8")


def truncate_frames(path: Path, start_step: int) -> None:
    """The same for FRAMES_FILE; a line that a kill cut short goes, too."""
    if not path.exists():
        return
    whole = [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
    with atomic_file(path) as aside:
        aside.write_text("".join(line for line in whole if json.loads(line)["step"] < start_step), encoding="utf-8")


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Number]]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record: dict[str, Number] = {**RECORD.validate_json(line)}
                record["step"] = int(record["step"])
            except (ValidationError, KeyError) as error:
                rule = "a JSON object of finite numbers with a step"
                raise MalformedFile(f"{path}, line {number} is not {rule}: {error}") from error
            yield line, record


class _Progress:
    """A bar in a terminal; elsewhere a line now and then, because a log file keeps every carriage return."""

    def __init__(self, total_steps: int, start_step: int, shown: Mapping[str, str]) -> None:
        self._total, self._first, self._shown = total_steps, start_step, shown
        self._started: float | None = None
        self._last_line = -math.inf
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            form = "step {n_fmt}/{total_fmt} |{bar:30}|  {desc}"
            self._bar = tqdm(total=total_steps, initial=start_step, bar_format=form, dynamic_ncols=True)

    def update(self, step: int, record: Mapping[str, Number]) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started = now - record["seconds"]
        done = step + 1
        left = (self._total - done) * (now - self._started) / (done - self._first)
        told = [form.format(record[key]) for key, form in self._shown.items()]
        status = "  ".join([*told, f"{left:,.0f} s left"])
        if self._bar is not None:
            self._bar.set_description_str(status, refresh=False)
            self._bar.update(done - self._bar.n)
        elif done == self._total or now - self._last_line >= QUIET_SECONDS:
            print(f"step {done}/{self._total}  {status}", file=sys.stderr, flush=True)
            self._last_line = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
