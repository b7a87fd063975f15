"""VBench suites: prompts and the files of their videos, `{prompt}-{i}.mp4`, and checks of a folder of such videos.

A suite is VBench's own list (VBench_full_info.json, or VBench-I2V's), or any prompts. The latter are measured in every
dimension that needs no more than a prompt. DIR.generation.json next to a folder DIR is the manifest of the layout that
made it (vbench_layout.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpgo_video.data.media import VideoError, VideoHeader, check_video, read_header
from bpgo_video.data.prompt_files import read_prompts

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


class SuiteError(ValueError):
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
        prompts.append(SuitePrompt(record.prompt, dimensions, record.info, media.get("image"), record.negative_prompt))
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
    manifest = sibling(folder, "generation.json")
    if not fps and manifest.is_file():
        try:
            fps = float(json.loads(manifest.read_text("utf-8"))["settings"]["fps"])
        except (ValueError, TypeError, KeyError) as error:
            raise SuiteError(
                f"{manifest} does not have the rate of its videos ({error!r}); give it by --fps"
            ) from error
    return {"fps": f"{fps:.4g}"} if fps else {}
