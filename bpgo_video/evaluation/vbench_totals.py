"""VBench's totals: normalisation and weights of VBench, VBench-I2V and VBench-2.0.

    n_d   = (x_d - min_d)/(max_d - min_d)                          not clipped
    group = sum_d w_d n_d / sum_d w_d                              over the group's dimensions
    total = sum_g W_g group_g / sum_g W_g

The constants are those of VBench's scripts/constant.py (arXiv 2311.17982, 2411.13503) and of VBench-2.0's (2503.21755).
VBench's scripts take a missing dimension as a raw score of 0, which the normalisation makes negative. Here an
incomplete set has no totals, unless they are requested and labelled.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpgo_video.evaluation.vbench_results import check_complete, merge
from bpgo_video.evaluation.vbench_suite import Suite, read_suite

RESULTS = "*_eval_results.json"


class TotalsError(ValueError):
    """Scores that make no totals; the message names the dimensions."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's groups, by name: weight in the total, and the weights of the group's dimensions.

    Attributes:
        other: dimensions that the benchmark measures and its total leaves out.
    """

    groups: Mapping[str, tuple[float, Mapping[str, float]]]
    other: tuple[str, ...] = ()

    @property
    def dimensions(self) -> list[str]:
        return [name for _, weights in self.groups.values() for name in weights]


def equal(*names: str) -> dict[str, float]:
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
    **equal("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
            "aesthetic_quality", "imaging_quality"),
    "dynamic_degree": 0.5,
}
BENCHMARKS = {
    "vbench": Benchmark({
        "quality": (4.0, QUALITY),
        "semantic": (1.0, equal(
            "object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene",
            "appearance_style", "temporal_style", "overall_consistency",
        )),
    }),
    "vbench-i2v": Benchmark({
        "quality": (1.0, {name: weight for name, weight in QUALITY.items() if name != "temporal_flickering"}),
        "i2v": (1.0, {"camera_motion": 0.1, "i2v_subject": 1.0, "i2v_background": 1.0}),
    }, other=("temporal_flickering",)),
    "vbench-2.0": Benchmark({
        "creativity": (1.0, equal("Composition", "Diversity")),
        "commonsense": (1.0, equal("Instance_Preservation", "Motion_Rationality")),
        "controllability": (1.0, equal(
            "Camera_Motion", "Complex_Landscape", "Complex_Plot", "Dynamic_Attribute", "Dynamic_Spatial_Relationship",
            "Human_Interaction", "Motion_Order_Understanding",
        )),
        "human_fidelity": (1.0, equal("Human_Anatomy", "Human_Clothes", "Human_Identity")),
        "physics": (1.0, equal("Material", "Mechanics", "Multi-View_Consistency", "Thermotics")),
    }),
}
# fmt: on


def benchmark_of(scores: Mapping[str, float]) -> str:
    """The first benchmark that has all of these dimensions.

    Raises:
        TotalsError: none has; names the dimensions that the nearest one lacks.
    """
    unknown = {name: sorted(scores.keys() - {*own.dimensions, *own.other}) for name, own in BENCHMARKS.items()}
    nearest = min(unknown, key=lambda name: len(unknown[name]))
    if unknown[nearest]:
        raise TotalsError(f"no benchmark has all of these dimensions; {nearest} has no {', '.join(unknown[nearest])}")
    return nearest


def totals(name: str, scores: Mapping[str, float], partial: bool = False) -> dict[str, float | None]:
    """The score of each group, then "total".

    Args:
        partial: groups are made of the dimensions that are there, None without any; the total is None unless every
            group has a score.

    Raises:
        TotalsError: a dimension is missing, and `partial` is not set; or a score is no finite number.
    """
    benchmark = BENCHMARKS[name]
    if wrong := sorted(f"{dimension} {score}" for dimension, score in scores.items() if not math.isfinite(score)):
        raise TotalsError(f"scores that are no finite numbers: {', '.join(wrong)}")
    missing = [dimension for dimension in benchmark.dimensions if dimension not in scores]
    if missing and not partial:
        raise TotalsError(
            f"{name}'s totals need all of its {len(benchmark.dimensions)} dimensions; missing: {', '.join(missing)} "
            "(--partial takes those that are there, and labels the result)"
        )
    normalised = {dimension: normalise(dimension, score) for dimension, score in scores.items()}
    groups = {group: weighted_mean(weights, normalised) for group, (_, weights) in benchmark.groups.items()}
    whole = None not in groups.values()
    return groups | {
        "total": weighted_mean({g: w for g, (w, _) in benchmark.groups.items()}, groups) if whole else None
    }


def normalise(dimension: str, score: float) -> float:
    lowest, highest = RANGES.get(dimension, (0.0, 1.0))
    return (score - lowest) / (highest - lowest)


def weighted_mean(weights: Mapping[str, float], values: Mapping[str, Any]) -> float | None:
    """Over the values that are there; None without any."""
    there = {name: weight for name, weight in weights.items() if name in values}
    return sum(weight * values[name] for name, weight in there.items()) / sum(there.values()) if there else None


def labelled_totals(paths: Sequence[Path], suite: Suite | None = None, partial: bool = False) -> dict[str, Any]:
    """`totals` of result files, or of the results in folders.

    Args:
        suite: the results must have each of its videos.
        partial: take what is there; "partial", "benchmark", "missing" and "proxy" are then next to the totals.

    Raises:
        FileNotFoundError, ResultError: see `merge`; or a result does not have the suite's videos.
        TotalsError: see `benchmark_of` and `totals`; or a dimension is a proxy, and `partial` is not set.
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
    if proxies and not partial:
        raise TotalsError(
            f"{', '.join(proxies)}: measured by a stand-in, which makes no total of {benchmark} (--partial takes it, "
            "and labels the result)"
        )
    found = totals(benchmark, scores, partial)
    missing = [dimension for dimension in BENCHMARKS[benchmark].dimensions if dimension not in scores]
    if not (missing or proxies):
        return found
    return {**found, "partial": True, "benchmark": benchmark, "missing": missing, "proxy": proxies}


def run(args: argparse.Namespace) -> None:
    """The subcommand `total`."""
    suite = None if args.suite is None else read_suite(args.suite, args.samples)
    found = labelled_totals(args.results, suite, args.partial)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        print(f"{name:16} {f'{value:.4f}' if isinstance(value, float) else value}")
