"""Training log: metrics.jsonl with one record per step, the progress line, and the run's trackers.

Every rank calls the log, so that a value that is not finite stops all ranks at the same step; only rank 0 writes.
Values are already reduced over ranks (`reduce_metrics`). The scores of a held-out evaluation are part of the record of
the step that precedes it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import torch.distributed as dist
from pydantic import AfterValidator, FiniteFloat, TypeAdapter
from torch import Tensor
from tqdm import tqdm

from bpgo_video.documents import MalformedFile, open_file, parse_json
from bpgo_video.files import atomic_file
from bpgo_video.training.trackers import Cell, Number, Trackers

METRICS_FILE = "metrics.jsonl"
FRAMES_FILE = "samples/frame_scores.jsonl"
LONGEST_LINE = 2**24  # bytes
SKIPPED = "updates_skipped"  # key of the number of updates that a step skipped
HELDOUT = {"heldout/": "", "heldout_ema/": " (average)"}  # prefix of keys -> suffix of their names in legends
QUIET_SECONDS = 10.0  # between progress lines if stderr is not a terminal


@dataclass(frozen=True)
class Keys:
    """Keys that every record of a run must have, and the format of those on the progress line."""

    required: tuple[str, ...]
    shown: Mapping[str, str]


ROLLOUTS = Keys(
    ("reward", "trust_mean", "grad_norm", "ratio_mean", "seconds"),
    {"reward": "reward {:.4f}", "trust_mean": "trust {:.3f}"},
)
MATCHING = Keys(("loss", "grad_norm", "seconds"), {"loss": "loss {:.4f}"})


def reduce_metrics(values: Mapping[str, Tensor | Number]) -> dict[str, float]:
    """Means over all ranks in float64; keys that end in `_max` or `_min` are extremes. Every rank calls it.

    Every rank must pass the same keys, and receives the same result.
    """
    own = {key: float(value) for key, value in sorted(values.items())}
    if not (dist.is_available() and dist.is_initialized()):
        return own
    ranks = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return {key: _statistic(key, torch.tensor([rank[key] for rank in ranks], dtype=torch.float64)) for key in own}


def _statistic(key: str, values: Tensor) -> float:
    if key.endswith("_max"):
        return values.amax().item()
    return (values.amin() if key.endswith("_min") else values.mean()).item()


class RunLog:
    """The log of one run, from `start_step` to `total_steps`; a context manager that every rank opens.

    Opening it removes the records of `start_step` and later from existing files: a resumed run repeats them.
    """

    def __init__(
        self,
        run_dir: Path,
        trackers: Trackers,
        total_steps: int,
        start_step: int = 0,
        keys: Keys = ROLLOUTS,
    ) -> None:
        self._run_dir, self._next_step, self._keys = run_dir, start_step, keys
        self._pending: Mapping[str, Number] = {}
        self._file: TextIO | None = None
        self._trackers = trackers
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        truncate(run_dir / METRICS_FILE, RECORD, start_step)
        truncate(run_dir / FRAMES_FILE, FRAMES, start_step)
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._progress = _Progress(total_steps, start_step, keys.shown)

    def log(self, step: int, values: Mapping[str, Tensor | Number]) -> None:
        """Appends the record of `step`: finite values, the required keys, a later step than the last record's.

        A step that skipped updates may lack keys, and its values that are not finite are left out.

        Raises:
            ValueError: on every rank, before anything is written; names the step and the key.
        """
        record = self._checked(step, {**values, **self._pending})
        self._next_step, self._pending = step + 1, {}
        if self._file is None:
            return
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # after a power loss, the records of every surviving checkpoint must exist
        self._trackers.log(step, {key: value for key, value in record.items() if key != "step"})
        self._progress.update(step, record)

    def later(self, message: str, values: Mapping[str, Number]) -> None:
        """Prints a message now, and adds the values to the next record."""
        self._pending = {**self._pending, **values}
        if self._file is not None:
            tqdm.write(message, file=sys.stderr)

    def frames(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends per-frame scores of a held-out evaluation to FRAMES_FILE; each line has a `step`."""
        if self._file is None or not lines:
            return
        path = self._run_dir / FRAMES_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)

    def media(self, step: int, name: str, videos: Sequence[tuple[Path, str]]) -> None:
        """Sends (mp4 path, caption) pairs to the trackers under `name`."""
        self._trackers.media(step, name, videos)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """Sends rows of the same keys to the trackers; a path is a video, which may be missing."""
        if rows:
            self._trackers.table(step, name, rows)

    def close(self, failed: bool = False) -> None:
        if self._file is None or self._file.closed:
            return
        self._file.close()
        self._progress.close()
        self._trackers.finish(failed)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _checked(self, step: int, values: Mapping[str, Tensor | Number]) -> dict[str, Number]:
        if step < self._next_step:
            raise ValueError(f"step {step} is logged already: the next record must be of step {self._next_step}")
        record = {key: float(value) for key, value in values.items() if key != "step"}
        if record.get(SKIPPED):
            return {"step": step, **{key: value for key, value in record.items() if math.isfinite(value)}}
        if missing := [key for key in self._keys.required if key not in record]:
            raise ValueError(f"the record of step {step} lacks {', '.join(missing)}")
        for key, value in record.items():
            if not math.isfinite(value):
                raise ValueError(f"metric {key!r} is {value} at step {step}: only finite values can be logged")
        return {"step": step, **record}


def _with_step(record: dict[str, Any]) -> dict[str, Any]:
    if "step" not in record:
        raise ValueError("there is no step")
    return {**record, "step": int(record["step"])}


RECORD: Any = TypeAdapter(Annotated[dict[str, FiniteFloat], AfterValidator(_with_step)])
FRAMES: Any = TypeAdapter(Annotated[dict[str, Any], AfterValidator(_with_step)])


def read_metrics(path: Path) -> list[dict[str, Number]]:
    """The records of a metrics.jsonl. A last line without a line break, which a killed run left, is ignored.

    Raises:
        MalformedFile: a line is not a JSON object of finite numbers with a step; names the file and the line.
    """
    records = []
    for _, record in _lines(path, RECORD):
        if isinstance(record, MalformedFile):
            raise record
        records.append(record)
    return records


def keys_with(records: Sequence[Mapping[str, Number]], *prefixes: str) -> list[str]:
    """Keys of any record that start with one of the prefixes, sorted."""
    return sorted({key for record in records for key in record if key.startswith(prefixes)})


def truncate(path: Path, form: Any, start_step: int) -> None:
    """Keeps the lines before `start_step` alone, atomically; nothing if there is no such file.

    Raises:
        MalformedFile: a line of an earlier step is damaged; names the file and the line. Later ones may be.
    """
    if not path.exists():
        return
    kept: list[bytes] = []
    last, damage = -1, None
    for line, record in _lines(path, form):
        if isinstance(record, MalformedFile):
            damage = damage or record
        elif record["step"] >= start_step:
            break
        elif damage:
            raise damage  # it is before a line that stays
        else:
            last = record["step"]
            kept.append(line)
    if damage and form is RECORD and last < start_step - 1:
        raise damage  # each step has a record, so it is that of an earlier step
    with atomic_file(path) as partial:
        partial.write_bytes(b"".join(kept))


def _lines(path: Path, form: Any) -> Iterator[tuple[bytes, dict[str, Any] | MalformedFile]]:
    """Each line, and its record or what is wrong with it."""
    rule = "a line must be a JSON object of finite numbers with a step; repair it, or remove the line"
    with open_file(path) as file:
        for number in count(1):
            line = file.readline(LONGEST_LINE)
            if not line.endswith(b"\n"):
                if len(line) == LONGEST_LINE:
                    yield line, MalformedFile(f"{path}, line {number} has more than {LONGEST_LINE:,} bytes; {rule}")
                return
            try:
                yield line, parse_json(form, line, f"{path}, line {number}", rule)
            except MalformedFile as error:
                yield line, error


class _Progress:
    """A progress bar in a terminal; elsewhere a line every QUIET_SECONDS, because log files keep carriage returns."""

    def __init__(self, total_steps: int, start_step: int, shown: Mapping[str, str]) -> None:
        self._total, self._first, self._shown = total_steps, start_step, shown
        self._started: float | None = None
        self._last_line = -math.inf
        form, hidden = "step {n_fmt}/{total_fmt} |{bar:30}|  {desc}", not sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=start_step, bar_format=form, dynamic_ncols=True, disable=hidden)

    def update(self, step: int, record: Mapping[str, Number]) -> None:
        now, done = time.monotonic(), step + 1
        if self._started is None:
            self._started = now - record["seconds"]
        left = (self._total - done) * (now - self._started) / (done - self._first)
        values = [form.format(record[key]) for key, form in self._shown.items() if key in record]
        status = "  ".join([*values, f"{left:,.0f} s left"])
        self._bar.set_description_str(status, refresh=False)
        self._bar.update(done - self._bar.n)
        if self._bar.disable and (done == self._total or now - self._last_line >= QUIET_SECONDS):
            print(f"step {done}/{self._total}  {status}", file=sys.stderr, flush=True)
            self._last_line = now

    def close(self) -> None:
        self._bar.close()
