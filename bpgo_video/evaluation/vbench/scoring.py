"""How good are the videos of a folder? Dimension by dimension, video by video, into VBench's result form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bpgo_video.evaluation.vbench.dimension import Dimension, DimensionError, Measured, Network, Sources, read_footage
from bpgo_video.evaluation.vbench.dimensions import OF_IMAGES, find_dimension
from bpgo_video.evaluation.vbench.result_files import Result, Video
from bpgo_video.evaluation.vbench.suite import (
    SUFFIX,
    Suite,
    SuiteError,
    SuitePrompt,
    image_path,
    listing,
)
from bpgo_video.evaluation.vbench.video_folder import check_videos

NAMED = re.compile(r"(?P<prompt>.*?)(-\d+)?\.mp4", re.DOTALL)  # VBench reads a custom video's prompt so


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        backbones: the network of a dimension, where it is not the default one.
        suite: whose videos they are; None: every video of the folder, its prompt in its name, in every dimension.
        images: folder of what image-to-video continued.
        fps: that all videos must have; None: that of the layout's manifest, or of most videos.
    """

    videos: Path
    dimensions: tuple[str, ...]
    backbones: Mapping[str, str]
    suite: Suite | None = None
    images: Path | None = None
    fps: float | None = None


def score_folder(
    asked: Asked, sources: Sources, done: Callable[[Sequence[Result]], object] = lambda results: None
) -> list[Result]:
    """The dimensions, in the order in which they were asked.

    Args:
        done: is given all results so far after each dimension: one may take hours.

    Raises:
        SuiteError: videos are missing or foreign, cannot be opened, or are not alike; nothing was measured.
        DimensionError: a dimension is unknown, or its network is missing; nothing was measured.
        VideoError: a video cannot be decoded to its end.
    """
    unknown = sorted(asked.backbones.keys() - set(asked.dimensions))
    if unknown:
        raise DimensionError(f"--backbone names {', '.join(unknown)}, which --dimensions does not")
    found = {name: find_dimension(name) for name in asked.dimensions}
    videos = {name: videos_of(name, asked.videos, asked.suite) for name in found}
    paths = sorted({path for chosen in videos.values() for path, _ in chosen})
    check_videos(asked.videos, asked.suite, paths, asked.fps)
    networks = {name: dimension.network(name, asked.backbones.get(name), sources) for name, dimension in found.items()}
    results: list[Result] = []
    for name, dimension in found.items():
        results.append(measure(name, dimension, networks[name], list(with_images(name, videos[name], asked))))
        done(results)
    return results


def videos_of(dimension: str, folder: Path, suite: Suite | None) -> list[tuple[Path, SuitePrompt]]:
    """The dimension's videos and their prompts.

    Raises:
        SuiteError: the folder does not exist, or the dimension has no videos.
    """
    if not folder.is_dir():
        raise SuiteError(f"there is no folder of videos {folder}")
    names = named_by_prompts(folder) if suite is None else suite.names(dimension)
    if not names:
        raise SuiteError(f"{folder if suite is None else suite.source} has no videos of {dimension}")
    return [(folder / name, prompt) for name, prompt in names.items()]


def named_by_prompts(folder: Path) -> dict[str, SuitePrompt]:
    """Every video of a folder, and the prompt that its name holds: `{prompt}-{i}.mp4` or `{prompt}.mp4`.

    Raises:
        SuiteError: the folder has something else.
    """
    present = sorted(path.name for path in folder.iterdir())
    if other := [repr(name) for name in present if not name.endswith(SUFFIX) or name.startswith(".")]:
        raise SuiteError(f"{folder} has files that are no {SUFFIX} videos; move them:{listing(other)}")
    return {name: SuitePrompt(NAMED.fullmatch(name)["prompt"]) for name in present}  # type: ignore[index]


def with_images(
    dimension: str, videos: Sequence[tuple[Path, SuitePrompt]], asked: Asked
) -> Iterator[tuple[Path, SuitePrompt, Path | None]]:
    """The videos with what they continued, where the dimension compares with it."""
    for path, prompt in videos:
        yield path, prompt, image_path(prompt, asked.images) if dimension in OF_IMAGES else None


def measure(
    name: str, dimension: Dimension, network: Network, videos: Sequence[tuple[Path, SuitePrompt, Path | None]]
) -> Result:
    """One dimension: every video's number, and their weighted mean.

    Raises:
        DimensionError: a video's number is not finite.
        VideoError: see `read_footage`.
    """
    found: list[Measured] = []
    for path, prompt, image in tqdm(videos, desc=name, unit="video", disable=None):
        measured = dimension.measure(network.call, read_footage(path, prompt, image))
        if not math.isfinite(measured.value):
            raise DimensionError(f"{name} of {path} is {measured.value}")
        found.append(measured)
    weights = sum(measured.weight for measured in found)
    score = sum(measured.value * measured.weight for measured in found) / weights * dimension.scale
    results = tuple(
        Video(str(path), measured.value, network.label, network.name)
        for (path, _, _), measured in zip(videos, found, strict=True)
    )
    return Result(name, score, results)
