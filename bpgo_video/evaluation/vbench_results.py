"""VBench's result files, checked when they are read.

    {dimension: [score, [{"video_path", "video_results", ...}, ...]]}

VBench-I2V's camera motion is a triple [score, parts, videos]. Our files say in addition how each video was measured:
"label" (exact, native or proxy) and "network". VBench's scripts read the first number alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from bpgo_video.atomic import write_json
from bpgo_video.evaluation.files import checked


class ResultError(ValueError):
    """Results that do not go together, or not with the videos; the message names the dimension."""


Number = Annotated[FiniteFloat, Field(strict=True)]


@checked_dataclass(frozen=True)
class Video:
    """One video's result, a number or a yes or no, and how it was measured (official: by VBench's own code)."""

    video_path: str
    video_results: Number | Annotated[bool, Field(strict=True)]
    label: str = "official"
    network: str = ""


@dataclass(frozen=True)
class Result:
    """One dimension: its score, and that of each video, in order."""

    dimension: str
    score: float
    videos: tuple[Video, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({video.label for video in self.videos}))


def each_once(videos: tuple[Video, ...]) -> tuple[Video, ...]:
    path, count = Counter(video.video_path for video in videos).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path!r} is there {count} times")
    return videos


def without_parts(entry: Any) -> Any:
    return [entry[0], entry[2]] if isinstance(entry, list) and len(entry) == 3 else entry


Score = Annotated[Number, Field(ge=-2, le=2)]  # lies within -1 and 1: a percentage is an error
Videos = Annotated[tuple[Video, ...], Field(min_length=1), AfterValidator(each_once)]
Entry = Annotated[tuple[Score, Videos], BeforeValidator(without_parts)]
FILE = TypeAdapter(Annotated[dict[str, Entry], Field(min_length=1)])


def write_results(path: Path, results: Sequence[Result]) -> None:
    write_json(path, {result.dimension: [result.score, list(map(asdict, result.videos))] for result in results})


def read_results(path: Path) -> list[Result]:
    """Every dimension of a file, in order.

    Raises:
        FileNotFoundError: there is none.
        MalformedFile: it is empty or cut short, of another form, or a score or a video's result is no finite number.
    """
    form = "a result file is {dimension: [score between -1 and 1, videos]}; was its evaluation cut short?"
    content = checked(FILE, path.read_bytes(), path, form)
    return [Result(dimension, score, videos) for dimension, (score, videos) in content.items()]


def merge(paths: Sequence[Path]) -> dict[str, Result]:
    """The dimensions of several files.

    Raises:
        FileNotFoundError, MalformedFile: see `read_results`.
        ResultError: two files have the same dimension.
    """
    found: dict[str, tuple[Path, Result]] = {}
    for path in paths:
        for result in read_results(path):
            if (name := result.dimension) in found:
                raise ResultError(f"{name} is in {found[name][0]} and in {path}; give one of them")
            found[name] = path, result
    return {name: result for name, (_, result) in found.items()}


def check_complete(result: Result, wanted: Collection[str]) -> None:
    """Checks that the result has exactly these files, by name.

    Raises:
        ResultError: videos are missing (VBench skips those it cannot decode), or others are there.
    """
    there = {Path(video.video_path).name for video in result.videos}
    missing, other = sorted(set(wanted) - there), sorted(there - set(wanted))
    if missing or other:
        what = f"lacks {len(missing)} videos, {missing[0]!r} first" if missing else f"has {other[0]!r} in addition"
        raise ResultError(f"{result.dimension}: the result {what}; it has {len(there)} of {len(wanted)} videos")
