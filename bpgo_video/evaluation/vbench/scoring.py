"""How good are the videos of a folder? Dimension by dimension, each rank its own videos, into VBench's result form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from bpgo_video.evaluation.vbench.dimension import Dimension, DimensionError, Measured, Network, Sources, read_footage
from bpgo_video.evaluation.vbench.dimensions import OF_IMAGES, find_dimension
from bpgo_video.evaluation.vbench.kept_scores import Line, drop_kept, keeping, read_kept
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
from bpgo_video.parallel.agreement import from_all, from_main, same_everywhere, same_verdict
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.randomness import reseeded

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


@dataclass(frozen=True)
class Item:
    """One video of a dimension: its prompt, and what it continued where the dimension compares with that."""

    path: Path
    prompt: SuitePrompt
    image: Path | None


@dataclass(frozen=True)
class Work:
    """A dimension that is ready to be measured."""

    name: str
    dimension: Dimension
    network: Network
    items: tuple[Item, ...]
    sources: Sources

    def key(self, item: Item) -> str:
        """Another one where anything changes that the item's number depends on; files by their size and time."""
        files = [_state(path) for path in (item.path, item.image, self.sources.head)]
        said = [item.path.name, item.prompt.text, dict(item.prompt.info)]
        of = [self.name, self.network.label, self.network.name, said, files]
        return sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def score_folder(
    asked: Asked,
    sources: Sources,
    mesh: Mesh,
    kept: Path,
    done: Callable[[Sequence[Result]], object] = lambda results: None,
) -> list[Result]:
    """The dimensions, in the order in which they were asked, the same on every rank; every rank calls it.

    Each rank measures its share of a dimension's videos. A number depends on its own video alone, so it is the same on
    any number of ranks, and a dimension's score is computed of all numbers in the videos' order.

    Args:
        kept: folder of the numbers that are measured so far; an earlier call's are taken, and all go in the end.
        done: is given all results so far after each dimension, on rank 0: one may take hours.

    Raises:
        SuiteError: videos are missing or foreign, cannot be opened, or are not alike; nothing was measured.
        DimensionError: a dimension is unknown, or its network is missing; nothing was measured.
        ResultError: a file of `kept` is damaged.
        ConfigError: an error of another rank, or the ranks do not see the same.
        VideoError: a video cannot be decoded to its end.
    """
    with same_verdict(mesh):
        works = prepare(asked, sources, mesh.is_main)
    same_everywhere(
        {
            "videos and prompts": repr([(work.name, work.items) for work in works]),
            "networks": repr([(work.network.label, work.network.name) for work in works]),
        },
        mesh,
    )
    results: list[Result] = []
    for work in works:
        results.append(measured_by_all(work, mesh, kept))
        if mesh.is_main:
            done(results)
    if mesh.is_main:
        drop_kept(kept, asked.dimensions)
    return results


def prepare(asked: Asked, sources: Sources, checks_files: bool) -> list[Work]:
    """The dimensions with their networks; errors as `score_folder` says.

    Args:
        checks_files: whether this rank opens every file: of many ranks one is enough.
    """
    unknown = sorted(asked.backbones.keys() - set(asked.dimensions))
    if unknown:
        raise DimensionError(f"--backbone names {', '.join(unknown)}, which --dimensions does not")
    found = {name: find_dimension(name) for name in asked.dimensions}
    videos = {name: videos_of(name, asked.videos, asked.suite) for name in found}
    if checks_files:
        paths = sorted({path for chosen in videos.values() for path, _ in chosen})
        check_videos(asked.videos, asked.suite, paths, asked.fps)
    networks = {name: dimension.network(name, asked.backbones.get(name), sources) for name, dimension in found.items()}
    return [
        Work(name, dimension, networks[name], tuple(with_images(name, videos[name], asked)), sources)
        for name, dimension in found.items()
    ]


def measured_by_all(work: Work, mesh: Mesh, kept: Path) -> Result:
    """One dimension's result, of what is kept and what each rank measures of the rest."""
    found = from_main(earlier(work, kept) if mesh.is_main else {}, mesh)
    todo = [place for place in range(len(work.items)) if place not in found]
    for part in from_all(measure(work, mesh.dealt(todo), mesh, kept), mesh):
        found |= part
    return result_of(work, [found[place] for place in range(len(work.items))])


def earlier(work: Work, kept: Path) -> dict[int, Measured]:
    """What an earlier call measured, by the video's place; said on the screen."""
    lines = read_kept(kept, work.name)
    keys = [work.key(item) for item in work.items] if lines else []
    found = {place: lines[key] for place, key in enumerate(keys) if key in lines}
    if found:
        print(f"{work.name}: {len(found)} of {len(work.items)} videos were measured before ({kept})", flush=True)
    return found


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


def with_images(dimension: str, videos: Sequence[tuple[Path, SuitePrompt]], asked: Asked) -> Iterator[Item]:
    """The videos with what they continued, where the dimension compares with it."""
    for path, prompt in videos:
        yield Item(path, prompt, image_path(prompt, asked.images) if dimension in OF_IMAGES else None)


def measure(work: Work, places: Sequence[int], mesh: Mesh, kept: Path) -> dict[int, Measured]:
    """This rank's numbers, by the video's place; each is kept as it comes. Errors are those of `number_of`."""
    found: dict[int, Measured] = {}
    if not places:
        return found
    share = f" (1 of {mesh.world_size} shares)" if mesh.world_size > 1 else ""
    hidden = None if mesh.is_main else True  # None: where there is no terminal
    with keeping(kept, work.name) as keep:
        for place in tqdm(places, desc=f"{work.name}{share}", unit="video", disable=hidden):
            key, found[place] = work.key(work.items[place]), number_of(work, work.items[place])
            keep(Line(key, work.items[place].path.name, found[place]))
    return found


def number_of(work: Work, item: Item) -> Measured:
    """One video's number; what a network draws from global generators is the same for each video.

    Raises:
        DimensionError: it is not finite.
        RuntimeError: of the network, such as a lack of memory; says of which video.
        VideoError: see `read_footage`.
    """
    footage = read_footage(item.path, item.prompt, item.image)
    try:
        with reseeded():
            measured = work.dimension.measure(work.network.call, footage)
    except RuntimeError as error:
        raise RuntimeError(f"{work.name} of {item.path}: {error}") from error
    if not math.isfinite(measured.value):
        raise DimensionError(f"{work.name} of {item.path} is {measured.value}")
    return measured


def result_of(work: Work, found: Sequence[Measured]) -> Result:
    """Every video's number, and their weighted mean, summed in the videos' order."""
    weights = sum(measured.weight for measured in found)
    score = sum(measured.value * measured.weight for measured in found) / weights * work.dimension.scale
    videos = tuple(
        Video(str(item.path), measured.value, work.network.label, work.network.name)
        for item, measured in zip(work.items, found, strict=True)
    )
    return Result(work.name, score, videos)


def _state(path: Path | None) -> tuple[int, int] | None:
    """Of a file, what changes when it does."""
    return None if path is None else ((found := path.stat()).st_size, found.st_mtime_ns)
