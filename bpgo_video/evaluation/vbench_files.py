"""VBench's files: suites of prompts, folders of their videos, results, and the command `evaluate total`.

A suite is VBench's own list (VBench_full_info.json, or VBench-I2V's), or any prompts, which are measured in every
dimension that needs no more than a prompt. Its videos are `{prompt}-{i}.mp4`. DIR.generation.json next to a folder DIR
is the manifest of the layout that made it (vbench_layout.py).

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
import importlib.util
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from bpgo_video.data.media import VideoError, VideoHeader, check_video, read_header
from bpgo_video.data.prompt_plan import read_prompts
from bpgo_video.documents import MAX_JSON, plain_json, read_json, read_text
from bpgo_video.errors import InputError, shown
from bpgo_video.files import write_json

Setting = TypeVar("Setting", int, float)

INSTALLED = "vbench"  # means the list inside the installed package
FULL_INFO = "VBench_full_info.json"
SAMPLES = 5  # per prompt, i = 0 to 4
SUFFIX = ".mp4"
LONGEST_NAME = 255 - len("..partial-00000000")  # bytes: the limit of file systems, less the name of a partial file
LISTED = 20  # problems in a message
CAMERA = ", camera "  # precedes a prompt's camera motion, which is not part of the name of VBench-I2V's image
PROMPT_IN_NAME = re.compile(r"(.*?)(-\d+)?\.mp4", re.DOTALL)  # as VBench reads a custom video's prompt
ENCODING = {"codec": "h264", "pixel format": "yuv420p"}
PROPERTIES: Mapping[str, Callable[[VideoHeader], str]] = {
    "fps": lambda header: f"{header.fps:.4g}",
    "frames": lambda header: str(header.frames),
    "size": lambda header: f"{header.width}x{header.height}",
    "codec": lambda header: header.codec,
    "pixel format": lambda header: header.pixel_format,
}


class SuiteError(InputError):
    """A suite, or a folder of its videos, is not usable; the message names every problem."""


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt of a suite.

    Attributes:
        dimensions: those measured on its videos; None: every requested one.
        info: further fields of the list, `auxiliary_info` or `image_name` for example.
        image: the image that its videos continue, if the list names a file.
        negative_prompt: for guidance, if the list gives one.
    """

    text: str
    dimensions: tuple[str, ...] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    image: Path | None = None
    negative_prompt: str | None = None

    @property
    def problems(self) -> Iterable[str]:
        """Reasons why `{prompt}-{i}.mp4` is not a file name."""
        if "/" in self.text:
            yield f"{self.text!r} has a slash, which file names cannot have; write the prompt without it"
        if (size := len(os.fsencode(f"{self.text}-00{SUFFIX}"))) > LONGEST_NAME:
            yield f"{self.text[:60]!r}... makes a name of {size} bytes; at most {LONGEST_NAME} fit: shorten it"


@dataclass(frozen=True)
class Suite:
    """Prompts and the number of videos of each; `source` is the file of the prompts."""

    source: Path
    prompts: tuple[SuitePrompt, ...]
    samples: int = SAMPLES

    def names(self, dimension: str | None = None) -> dict[str, SuitePrompt]:
        """The files of the suite, or of one dimension, in order, with their prompts."""
        return {
            f"{prompt.text}-{sample}{SUFFIX}": prompt
            for prompt in self.prompts
            if dimension is None or prompt.dimensions is None or dimension in prompt.dimensions
            for sample in range(self.samples)
        }

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that the list names, in its order; none for plain prompts."""
        return tuple(dict.fromkeys(name for prompt in self.prompts for name in prompt.dimensions or ()))


def find_suite(source: str) -> Path:
    """The path itself; for `vbench`, the list inside the installed package.

    The package is found without importing it, because its import downloads files.

    Raises:
        SuiteError: there is no such file or package.
    """
    if source != INSTALLED:
        path = Path(source).expanduser()
        if not path.is_file():
            raise SuiteError(f"the suite {source!r} is not a file; give a prompt list, {FULL_INFO}, or {INSTALLED!r}")
        return path
    spec = importlib.util.find_spec(INSTALLED)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / FULL_INFO).is_file():
            return path
    raise SuiteError(
        f"the package {INSTALLED!r} is not installed for this interpreter; give the path of {FULL_INFO} in another one "
        f"(PYTHON -c \"import importlib.util as i; print(i.find_spec('{INSTALLED}'))\" shows its folder)"
    )


def read_suite(source: str, samples: int = SAMPLES) -> Suite:
    """VBench's list (.json), or prompts (.txt, .jsonl, .csv).

    Raises:
        SuiteError: see `find_suite`; or a prompt cannot be a file name.
        PromptFileError: the list is damaged, empty, or has a prompt twice.
    """
    path = find_suite(source)
    is_list = path.suffix == ".json"
    prompts = []
    for record, media in ((line.record, line.media) for line in read_prompts([path])):
        dimensions = record.tags if is_list else None
        if isinstance(image := media.get("image"), bytes):
            raise SuiteError(f"{path} holds the images themselves; a suite needs them as files, with their paths in it")
        prompts.append(SuitePrompt(record.prompt, dimensions, record.info, image, record.negative_prompt))
    if problems := [problem for prompt in prompts for problem in prompt.problems]:
        raise SuiteError(f"{path} has prompts that cannot be file names:{listing(problems)}")
    verbatim = {entry["prompt_en"] for entry in json.loads(path.read_bytes())} if is_list else set()
    if padded := sorted(verbatim - {prompt.text for prompt in prompts}):  # VBench keeps the spaces, our reader strips
        raise SuiteError(f"{path} has prompts that begin or end with a space: {listing(map(repr, padded))}; remove it")
    return Suite(path, tuple(prompts), samples)


def image_path(prompt: SuitePrompt, images: Path | None) -> Path:
    """The image that the videos of a prompt continue.

    It is the file that the list names, or else one of VBench-I2V's folder of one aspect ratio (`data/crop/16-9`): the
    entry's `image_name`, or the prompt without its camera motion.

    Raises:
        SuiteError: no folder is given, or it lacks the image.
    """
    if prompt.image is not None:
        return prompt.image
    if images is None:
        raise SuiteError(f"prompt {prompt.text!r} names no image; give the folder of the suite's images: --images DIR")
    path = images / prompt.info.get("image_name", f"{prompt.text.split(CAMERA)[0]}.jpg")
    if not path.is_file():
        raise SuiteError(f"prompt {prompt.text!r} continues the image {path}, which does not exist")
    return path


def listing(problems: Iterable[str]) -> str:
    """The first problems, one per line, and the number of the others."""
    every = list(problems)
    more = [f"... and {len(every) - LISTED} more"] if len(every) > LISTED else []
    return "\n  ".join(["", *every[:LISTED], *more])


def videos_of(dimension: str, folder: Path, suite: Suite | None) -> dict[str, SuitePrompt]:
    """The names of the dimension's videos and their prompts; without a suite all videos, with the prompts in their
    names (`{prompt}-{i}.mp4` or `{prompt}.mp4`).

    Raises:
        SuiteError: there is no such folder, the dimension has no videos, or without a suite other files are present.
    """
    if not folder.is_dir():
        raise SuiteError(f"there is no folder of videos {folder}")
    if suite is not None:
        names = suite.names(dimension)
    else:
        present = sorted(path.name for path in folder.iterdir())
        if other := [repr(name) for name in present if not name.endswith(SUFFIX) or name.startswith(".")]:
            raise SuiteError(f"{folder} has files that are not {SUFFIX} videos; move them:{listing(other)}")
        names = {name: SuitePrompt(PROMPT_IN_NAME.sub(r"\1", name)) for name in present}
    if not names:
        raise SuiteError(f"{folder if suite is None else suite.source} has no videos of {dimension}")
    return names


def check_videos(
    folder: Path, suite: Suite | None, videos: Mapping[str, Mapping[str, SuitePrompt]], fps: float | None = None
) -> None:
    """Checks the headers of all dimensions' videos. Raises SuiteError with every problem."""
    names = {name for chosen in videos.values() for name in chosen}
    if problems := video_problems(folder, suite, names, fps):
        raise SuiteError(f"{folder} cannot be measured:{listing(problems)}")


def sibling(folder: Path, name: str) -> Path:
    """A path next to a folder of videos, for files that must not be inside it."""
    absolute = Path(os.path.abspath(folder))
    return absolute.with_name(f"{absolute.name}.{name}")


def video_problems(
    folder: Path, suite: Suite | None, names: Iterable[str] | None = None, fps: float | None = None, whole: bool = False
) -> list[str]:
    """All problems of a folder of videos that would make VBench's numbers wrong.

    Args:
        suite: files outside it are a problem; None allows any.
        names: of the files to check; None: all of the suite's.
        fps: required of the videos; None: the manifest's, or that of most videos.
        whole: decode every frame, and compare length, size and encoding too; else only the headers' rates.

    Raises:
        SuiteError: there is no such folder, or its manifest is damaged.
    """
    if not folder.is_dir():
        raise SuiteError(f"there is no folder of videos {folder}")
    problems, headers = [] if suite is None else foreign_problems(folder, suite), {}
    for name in sorted(suite.names() if names is None and suite is not None else names or ()):
        path = folder / name
        try:
            headers[name] = read_header(path)
            if whole and (count := check_video(str(path), str(path))) < headers[name].frames:
                problems.append(f"{path} holds {count} of {headers[name].frames} frames; is it complete?")
        except VideoError as error:
            problems.append(str(error) if path.is_file() else f"{name!r} is missing")
    expected = expected_rate(folder, fps)
    if whole:
        return problems + header_problems(headers, ENCODING | expected)
    return problems + header_problems(headers, expected, ("fps",))


def foreign_problems(folder: Path, suite: Suite) -> list[str]:
    """Files outside the suite, and files with another spelling of a name."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    names, problems = suite.names(), []
    by_spelling = {plain(name): name for name in names}
    for name in sorted(set(os.listdir(folder)) - names.keys()):
        problem = "is none of the suite's files, and VBench allows no others in the folder: move it"
        if near := by_spelling.get(plain(name)):
            problem = f"is another spelling of {near!r}, and VBench finds only that one; rename or remove it"
        problems.append(f"{name!r} {problem}")
    return problems


def header_problems(
    headers: Mapping[str, VideoHeader], expected: Mapping[str, str], properties: Iterable[str] = tuple(PROPERTIES)
) -> list[str]:
    """Videos whose PROPERTIES differ from the `expected` ones, or else from those of most videos."""
    problems = []
    for name in properties:
        texts = {file: PROPERTIES[name](header) for file, header in headers.items()}
        usual = expected.get(name) or max(Counter(texts.values()).items(), key=lambda item: item[1], default=("", 0))[0]
        problems += [
            f"{file!r} has {name} {text} where {usual} is expected" for file, text in texts.items() if text != usual
        ]
    return problems


def expected_rate(folder: Path, fps: float | None) -> dict[str, str]:
    """The requested rate, or that in the manifest next to the folder; empty without either."""
    fps = fps or made_with(folder, "fps", "--fps", 0.0)
    return {"fps": f"{fps:.4g}"} if fps else {}


def samples_of(folder: Path, samples: int | None) -> int:
    """The requested videos per prompt, or those in the manifest next to the folder, or SAMPLES."""
    return samples or made_with(folder, "samples_per_prompt", "--samples", SAMPLES)


def made_with(folder: Path, setting: str, flag: str, default: Setting) -> Setting:
    """A setting in the manifest next to a folder of videos; `default` without a manifest.

    Raises:
        SuiteError: the manifest is damaged.
    """
    manifest = sibling(folder, "generation.json")
    if not manifest.is_file():
        return default
    try:
        return type(default)(plain_json(read_text(manifest, MAX_JSON), "it")["settings"][setting])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise SuiteError(f"{manifest} has no usable {setting} ({shown(error)}); give it by {flag}") from error


RESULTS = "*_eval_results.json"
Number = Annotated[FiniteFloat, Field(strict=True)]


class ResultError(InputError):
    """Results contradict each other, or do not match the videos; the message names the dimension."""


class TotalsError(InputError):
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
    content = read_json(FILE, path, form)
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
        raise FileNotFoundError(
            f"there is no result file or folder {', '.join(lost)}; bpgo-video evaluate score --output FILE.json writes "
            f"a file, and bpgo-video evaluate vbench --output DIR a folder of {RESULTS}"
        )
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
    suite = None if args.suite is None else read_suite(args.suite, args.samples or SAMPLES)
    values = labelled_totals(args.results, suite, args.partial)
    if args.json:
        print(json.dumps(values, indent=1))
        return
    for name, value in values.items():
        print(f"{name:16} {f'{value:.4f}' if isinstance(value, float) else value}")
