"""Which videos does VBench want, and is a folder of them complete? `{prompt}-{i}.mp4`, the prompt as it is in the list.

A suite is VBench's own list (VBench_full_info.json, of VBench-I2V too), or any prompts: then every dimension that needs
no more than a prompt is measured on all of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpgo_video.data.prompt_files import read_prompts
from bpgo_video.data.prompt_plan import make_plan

INSTALLED = "vbench"  # stands for the list inside the installed package
FULL_INFO = "VBench_full_info.json"
SAMPLES = 5  # of each prompt, i = 0 to 4
SUFFIX = ".mp4"
LONGEST_NAME = 255 - len("..partial-00000000")  # bytes: file systems take 255, and a file is written aside first
SHOWN = 20  # problems that a message lists
CAMERA = ", camera "  # before a prompt's camera motion, which VBench-I2V's image of the prompt has not


class SuiteError(ValueError):
    """A suite, or a folder of its videos, that cannot be used as it is; the message names every problem."""


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt of a suite.

    Attributes:
        dimensions: that are measured on its videos; None: every one that is asked.
        info: what else the list says of it, `auxiliary_info` or `image_name` for example.
        image: what its videos continue, where the list names a file.
        negative_prompt: what guidance steers away from, where the list says so.
    """

    text: str
    dimensions: tuple[str, ...] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    image: Path | None = None
    negative_prompt: str | None = None

    def name(self, sample: int) -> str:
        """The file of one of its videos."""
        return f"{self.text}-{sample}{SUFFIX}"

    def measured_in(self, dimension: str) -> bool:
        return self.dimensions is None or dimension in self.dimensions


@dataclass(frozen=True)
class Suite:
    """Prompts, and how many videos there are of each.

    Attributes:
        source: the file that they came from.
    """

    source: Path
    prompts: tuple[SuitePrompt, ...]
    samples: int = SAMPLES

    def names(self, dimension: str | None = None) -> dict[str, SuitePrompt]:
        """The files of the suite, or of one dimension, in order, and whose they are."""
        asked = [prompt for prompt in self.prompts if dimension is None or prompt.measured_in(dimension)]
        return {prompt.name(sample): prompt for prompt in asked for sample in range(self.samples)}

    @property
    def dimensions(self) -> tuple[str, ...]:
        """What the list names, in its order; none where it is of prompts alone."""
        return tuple(dict.fromkeys(name for prompt in self.prompts for name in prompt.dimensions or ()))


def find_suite(source: str) -> Path:
    """The file behind `vbench`, which is the list inside the installed package, or the path itself.

    The package is found without being imported: importing it downloads.

    Raises:
        SuiteError: there is no such file or package.
    """
    if source != INSTALLED:
        path = Path(source).expanduser()
        if not path.is_file():
            raise SuiteError(f"the suite {source!r} is no file; give a prompt list, {FULL_INFO}, or {INSTALLED!r}")
        return path
    spec = importlib.util.find_spec(INSTALLED)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders if (path := Path(folder) / FULL_INFO).is_file()]
    if not found:
        raise SuiteError(
            f"the package {INSTALLED!r} is not installed beside this interpreter; name the {FULL_INFO} of another one "
            f"(PYTHON -c \"import importlib.util as i; print(i.find_spec('{INSTALLED}'))\" tells its folder)"
        )
    return found[0]


def read_suite(source: str, samples: int = SAMPLES) -> Suite:
    """VBench's list (.json), or prompts (.txt, .jsonl, .csv).

    Raises:
        SuiteError: see `find_suite`; or prompts that no file can be named by.
        PromptFileError: the list is damaged, empty, or has one prompt twice.
    """
    path = find_suite(source)
    make_plan([path])
    listed = path.suffix == ".json"
    prompts = tuple(
        SuitePrompt(
            line.record.prompt,
            line.record.tags if listed else None,
            line.record.info,
            line.media.get("image"),
            line.record.negative_prompt,
        )
        for line in read_prompts([path])
    )
    if wrong := [problem for prompt in prompts for problem in name_problems(prompt.text)]:
        raise SuiteError(f"{path} has prompts that VBench's files cannot be named by: {listing(wrong)}")
    if listed:
        _check_verbatim(path, prompts)
    return Suite(path, prompts, samples)


def name_problems(prompt: str) -> list[str]:
    """Why no file can be called `{prompt}-{i}.mp4`."""
    bytes_ = len(os.fsencode(f"{prompt}-00{SUFFIX}"))
    found = []
    if "/" in prompt:
        found.append(f"{prompt!r} has a slash, which no file name can; write the prompt without it")
    if bytes_ > LONGEST_NAME:
        found.append(f"{prompt[:60]!r}... makes a name of {bytes_} bytes; at most {LONGEST_NAME} fit: shorten it")
    return found


def _check_verbatim(path: Path, prompts: Sequence[SuitePrompt]) -> None:
    """VBench looks for the prompt with the blanks around it, and prompts are read without."""
    listed = {entry["prompt_en"] for entry in json.loads(path.read_bytes())}
    if other := sorted(listed - {prompt.text for prompt in prompts}):
        raise SuiteError(f"{path} has prompts that begin or end with a blank: {listing(map(repr, other))}; remove it")


def image_path(prompt: SuitePrompt, images: Path | None) -> Path:
    """The image that the videos of a prompt continue.

    It is the file that the list names, or else one of VBench-I2V's folder of one shape (`data/crop/16-9`): the entry's
    `image_name`, or the prompt without its camera motion.

    Raises:
        SuiteError: no folder, or no such image in it.
    """
    if prompt.image is not None:
        return prompt.image
    if images is None:
        raise SuiteError(f"prompt {prompt.text!r} names no image; give the folder of the suite's images (--images)")
    path = images / prompt.info.get("image_name", f"{prompt.text.split(CAMERA)[0]}.jpg")
    if not path.is_file():
        raise SuiteError(f"prompt {prompt.text!r} continues the image {path}, which does not exist")
    return path


def folder_problems(folder: Path, suite: Suite) -> list[str]:
    """What VBench would stumble over, by the names alone: missing and foreign files, and names that are nearly right.

    Raises:
        SuiteError: there is no such folder.
    """
    if not folder.is_dir():
        raise SuiteError(f"there is no folder of videos {folder}")
    present = set(os.listdir(folder))
    missing = [f"{name!r} is missing" for name in suite.names() if name not in present]
    return missing + foreign_problems(folder, suite)


def foreign_problems(folder: Path, suite: Suite) -> list[str]:
    """Files that are none of the suite's, or one under another spelling."""
    wanted = suite.names()
    nearly = {_plain(name): name for name in wanted}
    return [_foreign(name, nearly.get(_plain(name))) for name in sorted(set(os.listdir(folder)) - wanted.keys())]


def _foreign(name: str, nearly: str | None) -> str:
    if nearly is None:
        return f"{name!r} is none of the suite's files; VBench wants nothing else in the folder: move it"
    return f"{name!r} is another spelling of {nearly!r}, under which alone VBench finds it; rename or remove it"


def listing(problems: Iterable[str]) -> str:
    """The first problems, one a line, and how many more there are."""
    every = list(problems)
    more = [f"... and {len(every) - SHOWN} more"] if len(every) > SHOWN else []
    return "\n  ".join(["", *every[:SHOWN], *more])


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
