"""Suites: the prompts of a benchmark and the file names of their videos, `{prompt}-{i}.mp4`, the prompt verbatim.

A suite is VBench's own list (VBench_full_info.json, or VBench-I2V's), or any prompts. The latter are measured in every
dimension that needs no more than a prompt.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpgo_video.data.prompt_files import read_prompts

INSTALLED = "vbench"  # stands for the list inside the installed package
FULL_INFO = "VBench_full_info.json"
SAMPLES = 5  # of each prompt, i = 0 to 4
SUFFIX = ".mp4"
LONGEST_NAME = 255 - len("..partial-00000000")  # bytes: file systems take 255, and files are first written aside
LISTED = 20  # problems in a message
CAMERA = ", camera "  # before a prompt's camera motion, which is not part of the name of VBench-I2V's image


class SuiteError(ValueError):
    """A suite, or a folder of its videos, that cannot be used; the message names every problem."""


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt of a suite.

    Attributes:
        dimensions: measured on its videos; None: every requested one.
        info: what else the list says about it, `auxiliary_info` or `image_name` for example.
        image: what its videos continue, if the list names a file.
        negative_prompt: for guidance, if the list gives one.
    """

    text: str
    dimensions: tuple[str, ...] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    image: Path | None = None
    negative_prompt: str | None = None

    @property
    def problems(self) -> Iterable[str]:
        """Why no file can be called `{prompt}-{i}.mp4`."""
        if "/" in self.text:
            yield f"{self.text!r} has a slash, which no file name can; write the prompt without it"
        if (size := len(os.fsencode(f"{self.text}-00{SUFFIX}"))) > LONGEST_NAME:
            yield f"{self.text[:60]!r}... makes a name of {size} bytes; at most {LONGEST_NAME} fit: shorten it"


@dataclass(frozen=True)
class Suite:
    """Prompts and the number of videos of each; `source` is the file they were read from."""

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

    The package is found without importing it, because importing it downloads.

    Raises:
        SuiteError: there is no such file or package.
    """
    if source != INSTALLED:
        path = Path(source).expanduser()
        if not path.is_file():
            raise SuiteError(f"the suite {source!r} is no file; give a prompt list, {FULL_INFO}, or {INSTALLED!r}")
        return path
    spec = importlib.util.find_spec(INSTALLED)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / FULL_INFO).is_file():
            return path
    raise SuiteError(
        f"the package {INSTALLED!r} is not installed for this interpreter; name the {FULL_INFO} of another one "
        f"(PYTHON -c \"import importlib.util as i; print(i.find_spec('{INSTALLED}'))\" shows its folder)"
    )


def read_suite(source: str, samples: int = SAMPLES) -> Suite:
    """VBench's list (.json), or prompts (.txt, .jsonl, .csv).

    Raises:
        SuiteError: see `find_suite`; or a prompt cannot be a file name.
        PromptFileError: the list is damaged, empty, or has a prompt twice.
    """
    path = find_suite(source)
    listed = path.suffix == ".json"
    prompts = []
    for record, media in ((line.record, line.media) for line in read_prompts([path])):
        dimensions = record.tags if listed else None
        prompts.append(SuitePrompt(record.prompt, dimensions, record.info, media.get("image"), record.negative_prompt))
    if wrong := [problem for prompt in prompts for problem in prompt.problems]:
        raise SuiteError(f"{path} has prompts that cannot be file names:{listing(wrong)}")
    verbatim = {entry["prompt_en"] for entry in json.loads(path.read_bytes())} if listed else set()
    if blank := sorted(verbatim - {prompt.text for prompt in prompts}):  # which VBench keeps, and our reader strips
        raise SuiteError(f"{path} has prompts that begin or end with a blank: {listing(map(repr, blank))}; remove it")
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
        raise SuiteError(f"prompt {prompt.text!r} names no image; give the folder of the suite's images (--images)")
    path = images / prompt.info.get("image_name", f"{prompt.text.split(CAMERA)[0]}.jpg")
    if not path.is_file():
        raise SuiteError(f"prompt {prompt.text!r} continues the image {path}, which does not exist")
    return path


def listing(problems: Iterable[str]) -> str:
    """The first problems, one a line, and how many more there are."""
    every = list(problems)
    more = [f"... and {len(every) - LISTED} more"] if len(every) > LISTED else []
    return "\n  ".join(["", *every[:LISTED], *more])
