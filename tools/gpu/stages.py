"""Stages run in order of importance within a time budget, and a record that is always valid JSON."""

from __future__ import annotations

import gc
import json
import math
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import time
from types import FrameType
from typing import Any, Generic, TypeVar

import psutil
import torch

from bpgo_video.files import atomic_file, write_json
from tools.gpu.table import as_markdown

Context = TypeVar("Context")
Note = Callable[[str, Any], None]  # (name, a value or several by name): stored under the stage
MINUTES = 9.0  # for all stages by their estimates; a larger budget implies a slower machine
MOST = 2  # times its estimate, after which a stage is stopped
SHOWN = 150  # characters of a value in a progress line


class OutOfTime(BaseException):
    """A stage took much longer than its estimate. Not an Exception, so that `except Exception` does not catch it."""


@dataclass(frozen=True)
class Stage(Generic[Context]):
    """A function that records results, and its approximate seconds; it starts only if that much time is left."""

    work: Callable[[Context, Note], None]
    seconds: float


class Record:
    """Results so far, in OUTPUT/gpu.json and OUTPUT/gpu.md.

    Args:
        started: start of the process on the clock of time.time.
        facts: information about the whole run, such as the command.
    """

    def __init__(self, output: Path, started: float, facts: Mapping[str, Any]):
        self.output, self.started, self.holds = output, started, True
        self.stages: dict[str, dict[str, Any]] = {}
        self.results = {**facts, "stages": self.stages}
        self.write()

    @property
    def elapsed(self) -> float:
        return time() - self.started

    def note(self, stage: str, name: str, value: Any) -> None:
        """Store a value; dicts under the same name are merged."""
        figures, value = self.stages.setdefault(stage, {}), json_value(value)
        figures[name] = {**figures.get(name, {}), **value} if isinstance(value, dict) else value
        self.holds &= not fails(value)
        self.write()
        print(f"[{self.elapsed:6.1f} s] {stage}: {name} {json.dumps(value)[:SHOWN]}", flush=True)

    def fail(self, stage: str, name: str) -> None:
        """Store and print the exception that is being handled."""
        print(traceback.format_exc(), flush=True)
        self.note(stage, name, {"holds": False, "error": traceback.format_exc()})

    def write(self) -> None:
        write_json(self.output / "gpu.json", self.results)
        with atomic_file(self.output / "gpu.md") as path:
            path.write_text(as_markdown(self.results), "utf-8")


def json_value(value: Any) -> Any:
    """The value as JSON data, with infinities and NaN as strings."""
    if isinstance(value, Mapping):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def fails(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("holds") is False or any(map(fails, value.values())))


def run_stages(stages: Mapping[str, Stage[Context]], context: Context, record: Record, minutes: float) -> bool:
    """Run every stage for which enough time is left; return whether all stages succeeded and all checks hold."""
    for name, stage in stages.items():
        left = 60 * minutes - record.elapsed
        if left < stage.seconds:
            record.note(name, "skipped", f"{max(0.0, left):.0f} s were left; it takes about {stage.seconds:.0f} s")
            continue
        began = time()
        try:
            with deadline(min(left, MOST * max(1, minutes / MINUTES) * stage.seconds)):
                stage.work(context, partial(record.note, name))
        except (Exception, OutOfTime):  # record any failure and run the other stages
            record.fail(name, "failure")
        free_memory()
        record.note(name, "held_bytes", held_bytes())
        record.note(name, "seconds", time() - began)
    return record.holds


def attempt(record: Note, name: str, work: Callable[[], Any]) -> None:
    """Record the result of `work` or its exception; the stage continues."""
    try:
        results = work()
    except Exception:
        print(traceback.format_exc(), flush=True)
        results = {"holds": False, "error": traceback.format_exc()}
    record(name, results)
    free_memory()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block after `seconds`, at the next Python instruction of the main thread."""

    def over(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, over)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def held_bytes() -> int:
    """Memory that is still allocated after a stage and counts towards the peaks of later stages."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
