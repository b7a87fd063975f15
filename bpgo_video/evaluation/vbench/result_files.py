"""What did a benchmark measure? VBench's result files, read with everything that can be wrong in them named.

    {dimension: [score, [{"video_path", "video_results", ...}, ...]]}

A triple [score, parts, videos] is VBench-I2V's camera motion. Beside VBench's own keys each of our videos says how it
was measured: "label" (exact, native or proxy) and "network". VBench's scripts read the first number alone.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpgo_video.data.atomic import write_json

OFFICIAL = "official"  # measured by VBench's own code, which writes no label
FARTHEST = 2.0  # of a score, which lies within -1 and 1


class ResultError(ValueError):
    """A result file that cannot be used; the message names the file, the dimension and what is wrong."""


@dataclass(frozen=True)
class Video:
    """One video's result: a number or a yes or no, and how it was measured."""

    path: str
    value: float | bool
    label: str
    network: str = ""


@dataclass(frozen=True)
class Result:
    """One dimension: its score, and that of each video, in their order."""

    dimension: str
    score: float
    videos: tuple[Video, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({video.label for video in self.videos}))


def write_results(path: Path, results: Sequence[Result]) -> None:
    """VBench's form, with the labels."""
    write_json(
        path,
        {
            result.dimension: [
                result.score,
                [
                    {"video_path": v.path, "video_results": v.value, "label": v.label, "network": v.network}
                    for v in result.videos
                ],
            ]
            for result in results
        },
    )


def read_results(path: Path) -> list[Result]:
    """Every dimension of a file, in its order.

    Raises:
        FileNotFoundError: there is none.
        ResultError: it is empty or cut off, of another form, or has a score or a video's result that is no number.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        size = path.stat().st_size
        raise ResultError(f"{path} ({size} bytes) is no JSON: {error}; was its evaluation cut short?") from error
    if not isinstance(content, dict) or not content:
        raise ResultError(f"{path} holds {_kind(content)}; a result file holds {{dimension: [score, videos]}}")
    return [_result(f"{path}: {dimension}", dimension, entry) for dimension, entry in content.items()]


def merge(paths: Sequence[Path]) -> dict[str, Result]:
    """The dimensions of several files.

    Raises:
        FileNotFoundError, ResultError: see `read_results`; or a dimension is in two files.
    """
    found: dict[str, Result] = {}
    source: dict[str, Path] = {}
    for path in paths:
        for result in read_results(path):
            if result.dimension in found:
                raise ResultError(
                    f"{result.dimension} is in {source[result.dimension]} and in {path}; give one of them"
                )
            found[result.dimension], source[result.dimension] = result, path
    return found


def check_videos(result: Result, wanted: Sequence[str]) -> None:
    """Whether the result is of exactly these files, by their names.

    Raises:
        ResultError: videos are missing (VBench skips those that it cannot decode), or others are there.
    """
    there = {Path(video.path).name for video in result.videos}
    missing, other = sorted(set(wanted) - there), sorted(there - set(wanted))
    if missing or other:
        what = (
            f"lacks {len(missing)} videos, {missing[0]!r} first" if missing else f"has {other[0]!r} beside the suite's"
        )
        raise ResultError(f"{result.dimension}: the result {what}; of {len(there)} videos {len(wanted)} were asked")


def _result(place: str, dimension: str, entry: Any) -> Result:
    if not isinstance(entry, list) or len(entry) not in (2, 3):
        raise ResultError(f"{place} is {_kind(entry)}; it must be [score, videos], or [score, parts, videos]")
    score, videos = entry[0], entry[-1]
    if not _is_number(score):
        raise ResultError(f"{place} has the score {score!r}, which is no finite number")
    if abs(score) > FARTHEST:
        raise ResultError(f"{place} has the score {score}; scores lie within -1 and 1: is this a percentage?")
    if not isinstance(videos, list) or not videos:
        raise ResultError(f"{place} has no videos; nothing was measured")
    read = tuple(_video(place, video) for video in videos)
    if twice := [name for name, count in Counter(video.path for video in read).items() if count > 1]:
        raise ResultError(f"{place} has {twice[0]!r} {Counter(v.path for v in read)[twice[0]]} times")
    return Result(dimension, float(score), read)


def _video(place: str, video: Any) -> Video:
    if not isinstance(video, Mapping) or not {"video_path", "video_results"} <= video.keys():
        raise ResultError(f"{place} has the video {video!r}; it must have 'video_path' and 'video_results'")
    value = video["video_results"]
    if not isinstance(value, bool) and not _is_number(value):
        raise ResultError(f"{place} has {value!r} for {video['video_path']!r}, which is no finite number")
    return Video(str(video["video_path"]), value, video.get("label", OFFICIAL), video.get("network", ""))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind(content: Any) -> str:
    sized = f" of {len(content)}" if isinstance(content, list | dict) else ""
    return f"a {type(content).__name__}{sized}"
