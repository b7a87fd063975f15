"""The command `evaluate score`: VBench's dimensions of a folder of videos, which are divided among ranks.

OUTPUT.json.measured/{dimension}-{key}.json      the number of one video; deleted when OUTPUT.json is complete

The key is a hash of everything that the number depends on. An interrupted command continues with the other videos.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from pydantic import TypeAdapter
from tqdm import tqdm

from bpgo_video.cli import show_loading_once
from bpgo_video.data.media import VideoError, read_header, read_pixels
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_all, from_main, same_everywhere
from bpgo_video.documents import read_json
from bpgo_video.evaluation import vbench_files as suites
from bpgo_video.evaluation.heldout import device_of, independent_ranks
from bpgo_video.evaluation.vbench_dimensions import Dimension, DimensionError, Measured, find_dimension
from bpgo_video.evaluation.vbench_files import Result, Suite, SuitePrompt, Video, read_suite, write_results
from bpgo_video.evaluation.vbench_networks import Footage, Network, Sources
from bpgo_video.files import write_json
from bpgo_video.randomness import reseeded


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        backbones: the network of a dimension, if it is not the default one.
        suite: of the videos; None: every video of the folder, with the prompt in its name, in every dimension.
        images: folder of the images that image-to-video continued.
        fps: required of all videos; None: that of the layout's manifest, or of most videos.
    """

    videos: Path
    dimensions: tuple[str, ...]
    backbones: Mapping[str, str]
    suite: Suite | None = None
    images: Path | None = None
    fps: float | None = None


MEASURED = TypeAdapter(Measured)


@dataclass(frozen=True)
class Item:
    """One video of a dimension, and the image that it continues if the dimension compares them."""

    path: Path
    prompt: SuitePrompt
    image: Path | None = None


@dataclass(frozen=True)
class Task:
    """A dimension with its network and videos."""

    dimension: Dimension
    network: Network
    items: tuple[Item, ...]
    sources: Sources

    def kept_file(self, kept: Path, item: Item) -> Path:
        """The file of the item's number; its name changes with everything that the number depends on.

        Of files, size and modification time count.
        """
        stats = [path and path.stat() for path in (item.path, item.image, self.sources.head)]
        files = [stat and (stat.st_size, stat.st_mtime_ns) for stat in stats]
        prompt = [item.path.name, item.prompt.text, dict(item.prompt.info)]
        parts = [self.dimension.name, self.network.label, self.network.name, prompt, files]
        key = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return kept / f"{self.dimension.name}-{key}.json"

    def measure(self, item: Item) -> Measured:
        """One video's number. The random draws of a network are the same for every video.

        Raises:
            DimensionError: it is not finite.
            RuntimeError: of the network, such as a lack of memory; names the video.
            VideoError: the file cannot be decoded, or has fewer frames than its header says.
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

    def result(self, numbers: Mapping[int, Measured]) -> Result:
        """All videos' numbers, by place, and their weighted mean, summed in the videos' order."""
        ordered = [numbers[place] for place in range(len(self.items))]
        weights = sum(measured.weight for measured in ordered)
        score = sum(measured.value * measured.weight for measured in ordered) / weights * self.dimension.scale
        network, pairs = self.network, zip(self.items, ordered, strict=True)
        videos = (Video(str(item.path), measured.value, network.label, network.name) for item, measured in pairs)
        return Result(self.dimension.name, score, tuple(videos))


def run(args: argparse.Namespace) -> None:
    def done(results: Sequence[Result]) -> None:
        write_results(args.output, results)
        last = results[-1]
        labels = ", ".join(last.labels)
        print(f"{last.dimension:24} {last.score:.4f}  {labels}, {len(last.videos)} videos", flush=True)

    show_loading_once()
    with independent_ranks() as mesh:
        with all_or_none(mesh):
            backbones, dimensions = dict(map(parse_backbone, args.backbone)), tuple(dict.fromkeys(args.dimensions))
            suite = args.suite and read_suite(args.suite, suites.samples_of(args.videos, args.samples))
            request = Request(args.videos, dimensions, backbones, suite, args.images, args.fps)
            sources = Sources(device_of(args.device, mesh), head=args.head)
        score_folder(request, sources, mesh, kept_folder(args.output), done)
        if mesh.is_main:
            print(args.output)


def parse_backbone(text: str) -> tuple[str, str]:
    dimension, _, network = text.partition("=")
    if not (dimension and network):
        raise DimensionError(f"--backbone {text!r} must be DIMENSION=NETWORK")
    return dimension, network


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
        kept: folder of the numbers measured so far; those of an earlier call are used, and all are deleted at the end.
        done: receives all results so far after each dimension, on rank 0: a dimension may take hours.

    Raises:
        SuiteError: videos are missing or foreign, cannot be opened, or are not alike; nothing was measured.
        DimensionError: a dimension is unknown, or its network is missing; nothing was measured.
        MalformedFile: a file of `kept` is damaged.
        ConfigError: an error of another rank, or the ranks do not see the same files.
        VideoError: a video cannot be decoded completely.
    """
    with all_or_none(mesh):
        tasks = prepare(request, sources, mesh.is_main)
    videos = repr([(task.dimension.name, task.items) for task in tasks])
    networks = repr([(task.network.label, task.network.name) for task in tasks])
    same_everywhere({"videos and prompts": videos, "networks": networks}, mesh)
    results: list[Result] = []
    for task in tasks:
        numbers = from_main(read_kept(task, kept) if mesh.is_main else {}, mesh)
        rest = [place for place in range(len(task.items)) if place not in numbers]
        for part in from_all(measure_share(task, mesh.round_robin(rest), mesh, kept), mesh):
            numbers |= part
        results.append(task.result(numbers))
        if mesh.is_main:
            done(results)
    if mesh.is_main:
        drop_kept(kept, request.dimensions)
    return results


def prepare(request: Request, sources: Sources, checks_files: bool) -> list[Task]:
    """The dimensions with their networks and videos; for errors see `score_folder`.

    Args:
        checks_files: whether this rank opens every file; one of many ranks is enough.
    """
    if unknown := sorted(request.backbones.keys() - set(request.dimensions)):
        raise DimensionError(f"--backbone names {', '.join(unknown)}, which --dimensions does not")
    dimensions = [find_dimension(name) for name in request.dimensions]
    videos = {one.name: suites.videos_of(one.name, request.videos, request.suite) for one in dimensions}
    if checks_files:
        suites.check_videos(request.videos, request.suite, videos, request.fps)
    tasks = []
    for one in dimensions:
        network = one.network(request.backbones.get(one.name), sources)
        items = [
            Item(request.videos / name, prompt, suites.image_path(prompt, request.images) if one.continues else None)
            for name, prompt in videos[one.name].items()
        ]
        tasks.append(Task(one, network, tuple(items), sources))
    return tasks


def read_footage(item: Item) -> Footage:
    pixels, fps = read_pixels(item.path)
    if len(pixels) < (promised := read_header(item.path).frames):
        raise VideoError(f"{item.path} has {len(pixels)} of {promised} frames; is it complete?")
    return Footage(item.path, item.prompt, torch.from_numpy(pixels).permute(0, 3, 1, 2), fps, item.image)


def measure_share(task: Task, places: Sequence[int], mesh: Mesh, kept: Path) -> dict[int, Measured]:
    """This rank's numbers by the video's place; each is written to a file at once."""
    numbers: dict[int, Measured] = {}
    label = task.dimension.name + (f" (1 of {mesh.world_size} shares)" if mesh.world_size > 1 else "")
    hidden = None if mesh.is_main and places else True  # None: hidden outside terminals
    for place in tqdm(places, desc=label, unit="video", disable=hidden):
        path = task.kept_file(kept, task.items[place])
        numbers[place] = task.measure(task.items[place])
        write_json(path, asdict(numbers[place]))
    return numbers


def kept_folder(output: Path) -> Path:
    """The folder of the kept numbers of a result file."""
    return output.with_name(f"{output.name}.measured")


def read_kept(task: Task, kept: Path) -> dict[int, Measured]:
    """The numbers of an earlier call, by the video's place. Raises MalformedFile."""
    numbers = {}
    for place, item in enumerate(task.items):
        if (path := task.kept_file(kept, item)).is_file():
            numbers[place] = read_json(MEASURED, path, "delete it to measure its video again")
    if numbers:
        count = f"{len(numbers)} of {len(task.items)} videos"
        print(f"{task.dimension.name}: {count} were measured before ({kept})", flush=True)
    return numbers


def drop_kept(kept: Path, dimensions: Sequence[str]) -> None:
    """Deletes the numbers of these dimensions, and the folder if no others are left."""
    for dimension in dimensions:
        for path in [*kept.glob(f"{dimension}-*"), *kept.glob(f".{dimension}-*")]:  # and partial files
            path.unlink()
    if kept.is_dir() and not any(kept.iterdir()):
        kept.rmdir()
