"""Scores of the videos of a folder: dimension by dimension, each rank its share, numbers kept as they come.

OUTPUT.json.measured/{dimension}-{hex}.jsonl      of one process, a line a video; deleted when OUTPUT.json is complete

A line's key is a hash of everything that its number depends on. Lines of other keys, and a last one that was cut short,
are measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from pydantic import TypeAdapter
from tqdm import tqdm

from bpgo_video.cli import show_loading_once
from bpgo_video.data.media import VideoError, read_header, read_pixels
from bpgo_video.distributed.agreement import all_or_none, from_all, from_main, same_everywhere
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.evaluation.files import checked
from bpgo_video.evaluation.ranks import device_of, ranks_or_alone
from bpgo_video.evaluation.vbench_dimensions import Dimension, find_dimension
from bpgo_video.evaluation.vbench_folder import video_problems
from bpgo_video.evaluation.vbench_formulas import DimensionError, Footage, Measured
from bpgo_video.evaluation.vbench_networks import Network, Sources
from bpgo_video.evaluation.vbench_results import Result, Video, write_results
from bpgo_video.evaluation.vbench_suite import SUFFIX, Suite, SuiteError, SuitePrompt, image_path, listing, read_suite
from bpgo_video.randomness import reseeded

PROMPT_IN_NAME = re.compile(r"(.*?)(-\d+)?\.mp4", re.DOTALL)  # as VBench reads a custom video's prompt


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        backbones: the network of a dimension, where it is not the default one.
        suite: whose videos they are; None: every video of the folder, its prompt in its name, in every dimension.
        images: folder of what image-to-video continued.
        fps: required of all videos; None: the layout's manifest's, or that of most videos.
    """

    videos: Path
    dimensions: tuple[str, ...]
    backbones: Mapping[str, str]
    suite: Suite | None = None
    images: Path | None = None
    fps: float | None = None


@dataclass(frozen=True)
class Line:
    """One video's number, as it is kept."""

    key: str
    measured: Measured


LINE = TypeAdapter(Line)


@dataclass(frozen=True)
class Item:
    """One video of a dimension, and the image that it continues if the dimension compares with that."""

    path: Path
    prompt: SuitePrompt
    image: Path | None = None


@dataclass(frozen=True)
class Task:
    """A dimension that is ready to be measured."""

    dimension: Dimension
    network: Network
    items: tuple[Item, ...]
    sources: Sources

    def key(self, item: Item) -> str:
        """Changes when anything changes that the item's number depends on; files count by size and time."""
        stats = [path and path.stat() for path in (item.path, item.image, self.sources.head)]
        files = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
        said = [item.path.name, item.prompt.text, dict(item.prompt.info)]
        of = [self.dimension.name, self.network.label, self.network.name, said, files]
        return sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]

    def measure(self, item: Item) -> Measured:
        """One video's number. What a network draws from global generators is the same for every video.

        Raises:
            DimensionError: it is not finite.
            RuntimeError: of the network, such as a lack of memory; names the video.
            VideoError: the file cannot be decoded, or holds fewer frames than it says.
        """
        footage = read_footage(item)
        try:
            with reseeded():
                measured = self.dimension.formula(self.network.call, footage)
        except RuntimeError as error:
            raise RuntimeError(f"{self.dimension.name} of {item.path}: {error}") from error
        if not math.isfinite(measured.value):
            raise DimensionError(f"{self.dimension.name} of {item.path} is {measured.value}")
        return measured

    def result(self, found: Sequence[Measured]) -> Result:
        """Every video's number, and their weighted mean, summed in the videos' order."""
        weights = sum(measured.weight for measured in found)
        score = sum(measured.value * measured.weight for measured in found) / weights * self.dimension.scale
        pairs = zip(self.items, found, strict=True)
        network = self.network
        videos = (Video(str(item.path), measured.value, network.label, network.name) for item, measured in pairs)
        return Result(self.dimension.name, score, tuple(videos))


def read_footage(item: Item) -> Footage:
    pixels, fps = read_pixels(item.path)
    if len(pixels) < (promised := read_header(item.path).frames):
        raise VideoError(f"{item.path} holds {len(pixels)} of {promised} frames; is it complete?")
    return Footage(item.path, item.prompt, torch.from_numpy(pixels).permute(0, 3, 1, 2), fps, item.image)


def score_folder(
    request: Request,
    sources: Sources,
    mesh: Mesh,
    kept: Path,
    done: Callable[[Sequence[Result]], object] = lambda results: None,
) -> list[Result]:
    """The dimensions, in the requested order, the same on every rank; every rank calls it.

    Each rank measures its share of a dimension's videos. A number depends on its own video alone, so it is the same on
    any number of ranks, and a dimension's score is computed from all numbers in the videos' order.

    Args:
        kept: folder of the numbers measured so far; an earlier call's are used, and all are deleted at the end.
        done: receives all results so far after each dimension, on rank 0: a dimension may take hours.

    Raises:
        SuiteError: videos are missing or foreign, cannot be opened, or are not alike; nothing was measured.
        DimensionError: a dimension is unknown, or its network is missing; nothing was measured.
        MalformedFile: a file of `kept` is damaged.
        ConfigError: an error of another rank, or the ranks do not see the same.
        VideoError: a video cannot be decoded to its end.
    """
    with all_or_none(mesh):
        tasks = prepare(request, sources, mesh.is_main)
    videos = repr([(task.dimension.name, task.items) for task in tasks])
    networks = repr([(task.network.label, task.network.name) for task in tasks])
    same_everywhere({"videos and prompts": videos, "networks": networks}, mesh)
    results: list[Result] = []
    for task in tasks:
        found = from_main(read_kept(task, kept) if mesh.is_main else {}, mesh)
        rest = [place for place in range(len(task.items)) if place not in found]
        for part in from_all(measure_share(task, mesh.dealt(rest), mesh, kept), mesh):
            found |= part
        results.append(task.result([found[place] for place in range(len(task.items))]))
        if mesh.is_main:
            done(results)
    if mesh.is_main:
        drop_kept(kept, request.dimensions)
    return results


def prepare(request: Request, sources: Sources, checks_files: bool) -> list[Task]:
    """The dimensions with their networks; errors as `score_folder` says.

    Args:
        checks_files: whether this rank opens every file: of many ranks one is enough.
    """
    if unknown := sorted(request.backbones.keys() - set(request.dimensions)):
        raise DimensionError(f"--backbone names {', '.join(unknown)}, which --dimensions does not")
    found = [find_dimension(name) for name in request.dimensions]
    videos = {one.name: videos_of(one.name, request.videos, request.suite) for one in found}
    if checks_files:
        check_folder(request.videos, request.suite, videos, request.fps)
    networks = [one.network(request.backbones.get(one.name), sources) for one in found]
    return [
        Task(one, network, tuple(items_of(one, videos[one.name], request)), sources)
        for one, network in zip(found, networks, strict=True)
    ]


def items_of(dimension: Dimension, videos: Mapping[str, SuitePrompt], request: Request) -> Iterator[Item]:
    for name, prompt in videos.items():
        yield Item(request.videos / name, prompt, image_path(prompt, request.images) if dimension.continues else None)


def videos_of(dimension: str, folder: Path, suite: Suite | None) -> dict[str, SuitePrompt]:
    """The names of the dimension's videos and their prompts.

    Raises:
        SuiteError: the folder does not exist, or the dimension has no videos.
    """
    if not folder.is_dir():
        raise SuiteError(f"there is no folder of videos {folder}")
    if not (names := prompts_in_names(folder) if suite is None else suite.names(dimension)):
        raise SuiteError(f"{folder if suite is None else suite.source} has no videos of {dimension}")
    return names


def prompts_in_names(folder: Path) -> dict[str, SuitePrompt]:
    """Every video of a folder, and the prompt in its name: `{prompt}-{i}.mp4` or `{prompt}.mp4`.

    Raises:
        SuiteError: the folder holds something else.
    """
    present = sorted(path.name for path in folder.iterdir())
    if other := [repr(name) for name in present if not name.endswith(SUFFIX) or name.startswith(".")]:
        raise SuiteError(f"{folder} holds files that are no {SUFFIX} videos; move them:{listing(other)}")
    return {name: SuitePrompt(PROMPT_IN_NAME.sub(r"\1", name)) for name in present}


def check_folder(
    folder: Path, suite: Suite | None, videos: Mapping[str, Mapping[str, SuitePrompt]], fps: float | None = None
) -> None:
    """Checks all dimensions' videos by their headers. Raises SuiteError with every problem."""
    names = {name for chosen in videos.values() for name in chosen}
    if problems := video_problems(folder, suite, names, fps):
        raise SuiteError(f"{folder} cannot be measured as it is:{listing(problems)}")


def measure_share(task: Task, places: Sequence[int], mesh: Mesh, kept: Path) -> dict[int, Measured]:
    """This rank's numbers, by the video's place; each is kept as it comes."""
    found: dict[int, Measured] = {}
    if not places:
        return found
    label = task.dimension.name + (f" (1 of {mesh.world_size} shares)" if mesh.world_size > 1 else "")
    hidden = None if mesh.is_main else True  # None: where there is no terminal
    kept.mkdir(parents=True, exist_ok=True)
    with (kept / f"{task.dimension.name}-{secrets.token_hex(4)}.jsonl").open("x", encoding="utf-8") as file:
        for place in tqdm(places, desc=label, unit="video", disable=hidden):
            item = task.items[place]
            key, found[place] = task.key(item), task.measure(item)
            line = {"key": key, "video": item.path.name, "measured": asdict(found[place])}
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
    return found


def kept_folder(output: Path) -> Path:
    """The folder of a result file's lines."""
    return output.with_name(f"{output.name}.measured")


def read_kept(task: Task, kept: Path) -> dict[int, Measured]:
    """What an earlier call measured, by the video's place. Raises MalformedFile for a line of another form."""
    lines = {}
    for path in kept.glob(f"{task.dimension.name}-*.jsonl"):
        for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            line = checked(LINE, text, f"{path}, line {number}", "delete the file, and its videos are measured again")
            lines[line.key] = line.measured
    keys = [task.key(item) for item in task.items] if lines else []
    found = {place: lines[key] for place, key in enumerate(keys) if key in lines}
    if found:
        count = f"{len(found)} of {len(task.items)} videos"
        print(f"{task.dimension.name}: {count} were measured before ({kept})", flush=True)
    return found


def drop_kept(kept: Path, dimensions: Sequence[str]) -> None:
    """Deletes the lines of these dimensions, and the folder if no others are left."""
    for path in (path for dimension in dimensions for path in kept.glob(f"{dimension}-*.jsonl")):
        path.unlink()
    if kept.is_dir() and not any(kept.iterdir()):
        kept.rmdir()


def run(args: argparse.Namespace) -> None:
    """The subcommand `score`."""

    def done(results: Sequence[Result]) -> None:
        write_results(args.output, results)
        last = results[-1]
        labels = ", ".join(last.labels)
        print(f"{last.dimension:24} {last.score:.4f}  {labels}, {len(last.videos)} videos", flush=True)

    show_loading_once()
    with ranks_or_alone() as mesh:
        with all_or_none(mesh):
            backbones, dimensions = dict(map(backbone, args.backbone)), tuple(dict.fromkeys(args.dimensions))
            suite = None if args.suite is None else read_suite(args.suite, args.samples)
            request = Request(args.videos, dimensions, backbones, suite, args.images, args.fps)
            sources = Sources(device_of(args.device, mesh), head=args.head)
        score_folder(request, sources, mesh, kept_folder(args.output), done)
        if mesh.is_main:
            print(args.output)


def backbone(text: str) -> tuple[str, str]:
    dimension, _, network = text.partition("=")
    if not (dimension and network):
        raise ValueError(f"--backbone {text!r} must be DIMENSION=NETWORK")
    return dimension, network
