"""VBench's result files, and the command `evaluate total`: the totals of VBench, VBench-I2V and VBench-2.0.

A result file is checked when it is read:

    {dimension: [score, [{"video_path", "video_results", ...}, ...]]}

VBench-I2V's camera motion is a triple [score, parts, videos]. Our files also state how each video was measured: "label"
(exact, native or proxy) and "network". VBench's scripts read the first number alone.

    n_d   = (x_d - min_d)/(max_d - min_d)                          not clipped
    group = sum_d w_d n_d / sum_d w_d                              over the group's dimensions
    total = sum_g W_g group_g / sum_g W_g

The constants are those of VBench's scripts/constant.py (arXiv 2311.17982, 2411.13503) and of VBench-2.0's (2503.21755).
VBench's scripts count a missing dimension as a raw score of 0, which the normalisation makes negative. Here an
incomplete set has no totals, unless they are requested, and then the result is labelled.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from bpgo_video.evaluation.vbench_suite import Suite, read_suite
from bpgo_video.files import write_json
from bpgo_video.training.metrics import parse_json

RESULTS = "*_eval_results.json"
Number = Annotated[FiniteFloat, Field(strict=True)]


class ResultError(ValueError):
    """Results contradict each other, or do not match the videos; the message names the dimension."""


class TotalsError(ValueError):
    """The scores do not define totals; the message names the dimensions."""


@checked_dataclass(frozen=True)
class Video:
    """One video's result, a number or a bool, and how it was measured (official: by VBench's own code)."""

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


def _distinct(videos: tuple[Video, ...]) -> tuple[Video, ...]:
    path, count = Counter(video.video_path for video in videos).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path!r} appears {count} times")
    return videos


def _without_parts(entry: Any) -> Any:
    return [entry[0], entry[2]] if isinstance(entry, list) and len(entry) == 3 else entry


Score = Annotated[Number, Field(ge=-2, le=2)]  # scores are between -1 and 1: a percentage is an error
Videos = Annotated[tuple[Video, ...], Field(min_length=1), AfterValidator(_distinct)]
Entry = Annotated[tuple[Score, Videos], BeforeValidator(_without_parts)]
FILE = TypeAdapter(Annotated[dict[str, Entry], Field(min_length=1)])


def write_results(path: Path, results: Sequence[Result]) -> None:
    write_json(path, {result.dimension: [result.score, list(map(asdict, result.videos))] for result in results})


def read_results(path: Path) -> list[Result]:
    """Every dimension of a file, in order.

    Raises:
        FileNotFoundError: there is no such file.
        MalformedFile: it is empty or cut short, has another form, or a number is not finite.
    """
    form = "a result file is {dimension: [score between -1 and 1, videos]}; was its evaluation cut short?"
    content = parse_json(FILE, path.read_bytes(), path, form)
    return [Result(dimension, score, videos) for dimension, (score, videos) in content.items()]


def merge(paths: Sequence[Path]) -> dict[str, Result]:
    """The dimensions of several files.

    Raises:
        FileNotFoundError, MalformedFile: see `read_results`.
        ResultError: two files have the same dimension.
    """
    merged: dict[str, Result] = {}
    sources: dict[str, Path] = {}
    for path in paths:
        for result in read_results(path):
            if (name := result.dimension) in merged:
                raise ResultError(f"{name} is in {sources[name]} and in {path}; give one of them")
            merged[name], sources[name] = result, path
    return merged


def check_complete(result: Result, names: Collection[str]) -> None:
    """Checks that the result has exactly these files.

    Raises:
        ResultError: videos are missing (VBench skips those it cannot decode), or there are others.
    """
    present = {Path(video.video_path).name for video in result.videos}
    missing, other = sorted(set(names) - present), sorted(present - set(names))
    if missing or other:
        problem = f"lacks {len(missing)} videos, {missing[0]!r} first" if missing else f"has {other[0]!r} in addition"
        raise ResultError(f"{result.dimension}: the result {problem}; it has {len(present)} of {len(names)} videos")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's groups, by name: weight in the total, and the weights of the group's dimensions.

    Attributes:
        other: dimensions that the benchmark measures and its total omits.
    """

    groups: Mapping[str, tuple[float, Mapping[str, float]]]
    other: tuple[str, ...] = ()

    @property
    def dimensions(self) -> list[str]:
        return [name for _, weights in self.groups.values() for name in weights]


def _equal(*names: str) -> dict[str, float]:
    return dict.fromkeys(names, 1.0)


# fmt: off
RANGES = {  # (min, max) of a dimension's scores; (0, 1) for the others
    "subject_consistency": (0.1462, 1.0), "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0), "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222), "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364), "overall_consistency": (0.0, 0.364),
    "i2v_subject": (0.1462, 1.0), "i2v_background": (0.2615, 1.0),
}
QUALITY = {
    **_equal("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
             "aesthetic_quality", "imaging_quality"),
    "dynamic_degree": 0.5,
}
BENCHMARKS = {
    "vbench": Benchmark({
        "quality": (4.0, QUALITY),
        "semantic": (1.0, _equal(
            "object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene",
            "appearance_style", "temporal_style", "overall_consistency",
        )),
    }),
    "vbench-i2v": Benchmark({
        "quality": (1.0, {name: weight for name, weight in QUALITY.items() if name != "temporal_flickering"}),
        "i2v": (1.0, {"camera_motion": 0.1, "i2v_subject": 1.0, "i2v_background": 1.0}),
    }, other=("temporal_flickering",)),
    "vbench-2.0": Benchmark({
        "creativity": (1.0, _equal("Composition", "Diversity")),
        "commonsense": (1.0, _equal("Instance_Preservation", "Motion_Rationality")),
        "controllability": (1.0, _equal(
            "Camera_Motion", "Complex_Landscape", "Complex_Plot", "Dynamic_Attribute", "Dynamic_Spatial_Relationship",
            "Human_Interaction", "Motion_Order_Understanding",
        )),
        "human_fidelity": (1.0, _equal("Human_Anatomy", "Human_Clothes", "Human_Identity")),
        "physics": (1.0, _equal("Material", "Mechanics", "Multi-View_Consistency", "Thermotics")),
    }),
}
# fmt: on


def benchmark_of(scores: Mapping[str, float]) -> str:
    """The first benchmark that has all of these dimensions.

    Raises:
        TotalsError: there is none; names the dimensions that the nearest one lacks.
    """
    unknown = {name: sorted(scores.keys() - {*own.dimensions, *own.other}) for name, own in BENCHMARKS.items()}
    nearest = min(unknown, key=lambda name: len(unknown[name]))
    if unknown[nearest]:
        raise TotalsError(f"no benchmark has all of these dimensions; {nearest} has no {', '.join(unknown[nearest])}")
    return nearest


def totals(name: str, scores: Mapping[str, float]) -> dict[str, float | None]:
    """The score of each group, over the dimensions that are present, None without any; then "total", None unless every
    group has a score.

    Raises:
        TotalsError: a score is not finite.
    """
    benchmark = BENCHMARKS[name]
    if invalid := sorted(f"{dimension} {score}" for dimension, score in scores.items() if not math.isfinite(score)):
        raise TotalsError(f"scores must be finite numbers: {', '.join(invalid)}")
    normalised = {dimension: normalise(dimension, score) for dimension, score in scores.items()}
    groups = {group: weighted_mean(weights, normalised) for group, (_, weights) in benchmark.groups.items()}
    weights = {group: weight for group, (weight, _) in benchmark.groups.items()}
    return groups | {"total": None if None in groups.values() else weighted_mean(weights, groups)}


def normalise(dimension: str, score: float) -> float:
    lowest, highest = RANGES.get(dimension, (0.0, 1.0))
    return (score - lowest) / (highest - lowest)


def weighted_mean(weights: Mapping[str, float], values: Mapping[str, Any]) -> float | None:
    """Over the values that are present; None without any."""
    present = {name: weight for name, weight in weights.items() if name in values}
    return sum(weight * values[name] for name, weight in present.items()) / sum(present.values()) if present else None


def labelled_totals(paths: Sequence[Path], suite: Suite | None = None, partial: bool = False) -> dict[str, Any]:
    """`totals` of result files, or of the results in folders.

    Args:
        suite: the results must have each of its videos.
        partial: accept an incomplete set and proxies; the result then also has "partial", "benchmark", "missing" and
            "proxy".

    Raises:
        FileNotFoundError, ResultError: see `merge`; or a result does not have the suite's videos.
        TotalsError: see `benchmark_of` and `totals`; or a dimension is missing or a proxy, and `partial` is not set.
    """
    if lost := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{', '.join(lost)} is neither a result file nor a folder of {RESULTS}")
    results = merge([file for path in paths for file in (sorted(path.glob(RESULTS)) if path.is_dir() else [path])])
    if not results:
        raise TotalsError(f"there are no results {RESULTS} in {', '.join(map(str, paths))}")
    for name, result in results.items():
        if suite is not None:
            check_complete(result, suite.names(name).keys())
    scores = {name: result.score for name, result in results.items()}
    benchmark = benchmark_of(scores)
    proxies = [name for name, result in results.items() if "proxy" in result.labels]
    missing = [dimension for dimension in BENCHMARKS[benchmark].dimensions if dimension not in scores]
    if not (missing or proxies):
        return totals(benchmark, scores)
    if not partial:
        raise TotalsError(
            f"{benchmark}'s totals need VBench's own number of every dimension; missing: {', '.join(missing) or 'none'}"
            f", measured by a proxy: {', '.join(proxies) or 'none'} (--partial accepts this, and labels the result)"
        )
    partial_labels = {"partial": True, "benchmark": benchmark, "missing": missing, "proxy": proxies}
    return {**totals(benchmark, scores), **partial_labels}


def run(args: argparse.Namespace) -> None:
    suite = None if args.suite is None else read_suite(args.suite, args.samples)
    values = labelled_totals(args.results, suite, args.partial)
    if args.json:
        print(json.dumps(values, indent=1))
        return
    for name, value in values.items():
        print(f"{name:16} {f'{value:.4f}' if isinstance(value, float) else value}")
