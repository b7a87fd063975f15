"""What are a model's totals? VBench's normalisation and weights, of VBench, VBench-I2V and VBench-2.0.

    n_d   = (x_d - min_d)/(max_d - min_d)                          not clipped
    group = sum_d w_d n_d / sum_d w_d                              over the group's dimensions
    total = sum_g W_g group_g / sum_g W_g

The constants are those of VBench's scripts/constant.py (arXiv 2311.17982, 2411.13503) and of VBench-2.0's (2503.21755).
Its own scripts take a missing dimension for a raw score of 0, which becomes negative by the normalisation; here a set
that is not whole has no totals, unless they are asked for and labelled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bpgo_video.evaluation.vbench.result_files import check_videos, merge
from bpgo_video.evaluation.vbench.suite import Suite

PLAIN = (0.0, 1.0)
RESULTS = "*_eval_results.json"


class TotalsError(ValueError):
    """Scores that make no totals; the message names the dimensions."""


@dataclass(frozen=True)
class Group:
    """Dimensions that make one score.

    Attributes:
        weight: of the group in the total.
        dimensions: of the group, and their weights in it.
    """

    weight: float
    dimensions: Mapping[str, float]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's groups by name, and (min, max) of the dimensions whose scores are not normalised by 0 and 1."""

    groups: Mapping[str, Group]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def dimensions(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups.values() for name in group.dimensions)

    def normalised(self, dimension: str, score: float) -> float:
        lowest, highest = self.ranges.get(dimension, PLAIN)
        return (score - lowest) / (highest - lowest)


def _equal(weight: float, *names: str) -> Group:
    return Group(weight, dict.fromkeys(names, 1.0))


QUALITY = {
    "subject_consistency": 1.0,
    "background_consistency": 1.0,
    "temporal_flickering": 1.0,
    "motion_smoothness": 1.0,
    "aesthetic_quality": 1.0,
    "imaging_quality": 1.0,
    "dynamic_degree": 0.5,
}
RANGES = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
    "i2v_subject": (0.1462, 1.0),
    "i2v_background": (0.2615, 1.0),
}
BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "vbench": Benchmark(
            {
                "quality": Group(4.0, QUALITY),
                "semantic": _equal(
                    1.0,
                    "object_class",
                    "multiple_objects",
                    "human_action",
                    "color",
                    "spatial_relationship",
                    "scene",
                    "appearance_style",
                    "temporal_style",
                    "overall_consistency",
                ),
            },
            RANGES,
        ),
        "vbench-i2v": Benchmark(
            {
                "quality": Group(1.0, {name: w for name, w in QUALITY.items() if name != "temporal_flickering"}),
                "i2v": Group(1.0, {"camera_motion": 0.1, "i2v_subject": 1.0, "i2v_background": 1.0}),
            },
            RANGES,
        ),
        "vbench-2.0": Benchmark(
            {
                "creativity": _equal(1.0, "Composition", "Diversity"),
                "commonsense": _equal(1.0, "Instance_Preservation", "Motion_Rationality"),
                "controllability": _equal(
                    1.0,
                    "Camera_Motion",
                    "Complex_Landscape",
                    "Complex_Plot",
                    "Dynamic_Attribute",
                    "Dynamic_Spatial_Relationship",
                    "Human_Interaction",
                    "Motion_Order_Understanding",
                ),
                "human_fidelity": _equal(1.0, "Human_Anatomy", "Human_Clothes", "Human_Identity"),
                "physics": _equal(1.0, "Material", "Mechanics", "Multi-View_Consistency", "Thermotics"),
            }
        ),
    }
)


def benchmark_of(scores: Mapping[str, float]) -> str:
    """The first benchmark that has all of these dimensions.

    VBench-I2V also measures temporal flickering, which its total leaves out.

    Raises:
        TotalsError: none has; names the dimensions that the nearest one lacks.
    """
    names = set(scores)
    unknown = {
        name: sorted(names - {*benchmark.dimensions, *(QUALITY if name == "vbench-i2v" else ())})
        for name, benchmark in BENCHMARKS.items()
    }
    nearest = min(unknown, key=lambda name: len(unknown[name]))
    if unknown[nearest]:
        raise TotalsError(f"no benchmark has all of these dimensions; {nearest} has no {', '.join(unknown[nearest])}")
    return nearest


def missing_from(name: str, scores: Mapping[str, float]) -> list[str]:
    """Dimensions of the benchmark that have no score."""
    return [dimension for dimension in BENCHMARKS[name].dimensions if dimension not in scores]


def totals(name: str, scores: Mapping[str, float], partial: bool = False) -> dict[str, float | None]:
    """The score of each group, then "total".

    Args:
        partial: groups are of the dimensions that are there, None without any; the total is None unless every group has
            one.

    Raises:
        TotalsError: a dimension is missing, and `partial` is not set; or a score is no finite number.
    """
    benchmark = BENCHMARKS[name]
    if wrong := sorted(f"{dimension} {score}" for dimension, score in scores.items() if not math.isfinite(score)):
        raise TotalsError(f"scores that are no finite numbers: {', '.join(wrong)}")
    missing = missing_from(name, scores)
    if missing and not partial:
        raise TotalsError(
            f"{name}'s totals need all of its {len(benchmark.dimensions)} dimensions; missing: {', '.join(missing)} "
            "(--partial takes those that are there, and labels the result)"
        )
    found = {group: _group_score(benchmark, group, scores) for group in benchmark.groups}
    weights = {group: benchmark.groups[group].weight for group in benchmark.groups}
    there = {group: score for group, score in found.items() if score is not None}
    total = None
    if len(there) == len(found):
        total = sum(weights[group] * score for group, score in there.items()) / sum(weights.values())
    return {**found, "total": total}


def labelled_totals(paths: Sequence[Path], suite: Suite | None = None, partial: bool = False) -> dict[str, Any]:
    """`totals` of result files, or of the results in folders; labelled where the set is not the benchmark's own.

    Args:
        suite: that the results must be of, every video.
        partial: take what is there; "partial", "benchmark", "missing" and "proxy" then stand beside the totals.

    Raises:
        FileNotFoundError, ResultError: see `merge`; or a result is not of the suite's videos.
        TotalsError: see `benchmark_of` and `totals`; or a dimension is a proxy, and `partial` is not set.
    """
    if missing_paths := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{', '.join(missing_paths)} is neither a result file nor a folder of {RESULTS}")
    results = merge([file for path in paths for file in (sorted(path.glob(RESULTS)) if path.is_dir() else [path])])
    if not results:
        raise TotalsError(f"there are no results {RESULTS} in {', '.join(map(str, paths))}")
    for name, result in results.items():
        if suite is not None:
            check_videos(result, list(suite.names(name)))
    scores = {name: result.score for name, result in results.items()}
    benchmark = benchmark_of(scores)
    proxies = [name for name, result in results.items() if "proxy" in result.labels]
    if proxies and not partial:
        raise TotalsError(
            f"{', '.join(proxies)}: measured by a stand-in, which makes no total of {benchmark} (--partial takes it, "
            "and labels the result)"
        )
    found, missing = totals(benchmark, scores, partial), missing_from(benchmark, scores)
    if not (missing or proxies):
        return found
    return {**found, "partial": True, "benchmark": benchmark, "missing": missing, "proxy": proxies}


def _group_score(benchmark: Benchmark, group: str, scores: Mapping[str, float]) -> float | None:
    weights = {name: weight for name, weight in benchmark.groups[group].dimensions.items() if name in scores}
    if not weights:
        return None
    weighted = [weight * benchmark.normalised(name, scores[name]) for name, weight in weights.items()]
    return sum(weighted) / sum(weights.values())
