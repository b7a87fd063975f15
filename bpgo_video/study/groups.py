"""Groups of real samples with rewards and an oracle: a dump, one JSON line a sample, and reading it.

    {"prompt": "a red object", "oracle": [...], "rewards": {"alignment": [...], "motion": [...]}}

Each list has one score per scored frame, or one for the video. Consecutive lines are a group. The short names `t`, `o`,
`c`, `c5` and `m` of older dumps are read too.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import TypeAdapter
from torch import Tensor

from bpgo_video.documents import MalformedFile, decoded, parse_json
from bpgo_video.tiny.world import Caption

FrameScores = Float[Tensor, "groups group _"]  # rewards may score other frames than the oracle
Mask = Bool[Tensor, "groups"]
OLDER = {"c": "clip_score", "c5": "clip_score of 5 frames", "m": "motion"}  # names of rewards in older dumps
LARGEST = 2**30  # bytes of a dump


@dataclass(frozen=True)
class Sample:
    """A line of a dump."""

    prompt: str
    oracle: list[float]
    rewards: dict[str, list[float]]


@dataclass(frozen=True)
class Groups:
    """Groups of samples of one prompt each, fp64.

    Attributes:
        prompts: of each group.
        oracle: true scores of frames.
        rewards: scores of frames, or of the video in a single column, by name.
    """

    prompts: Sequence[str]
    oracle: FrameScores
    rewards: Mapping[str, FrameScores]

    @property
    def clear(self) -> Mask:
        """Whether the prompt states all attributes of the embedded world.

        Raises:
            ValueError: a prompt is no caption of that world.
        """
        return torch.tensor([Caption.parse(prompt).is_clear for prompt in self.prompts])


def read_groups(path: Path, size: int) -> Groups:
    """The groups of a dump, .jsonl or .jsonl.gz.

    Args:
        size: samples of a group.

    Raises:
        MalformedFile: names the file, the line and the rule.
        FileNotFoundError: no such file.
    """
    samples = list(read_samples(path))
    if not samples or len(samples) % size:
        raise MalformedFile(f"{path} has {len(samples)} lines: it needs groups of {size} consecutive ones")
    groups = [samples[start : start + size] for start in range(0, len(samples), size)]
    for index, group in enumerate(groups):
        if len(prompts := {sample.prompt for sample in group}) > 1:
            first, last = index * size + 1, (index + 1) * size
            raise MalformedFile(
                f"{path}, lines {first} to {last}, a group of {size}, has {len(prompts)} prompts; it must have one"
            )
    names = samples[0].rewards
    try:
        rewards = {name: torch.tensor([[one.rewards[name] for one in group] for group in groups]) for name in names}
        oracle = torch.tensor([[one.oracle for one in group] for group in groups])
    except (KeyError, ValueError) as error:
        raise MalformedFile(f"{path}: all lines must have the same rewards and numbers of frames: {error}") from None
    return Groups([group[0].prompt for group in groups], oracle.double(), {n: of.double() for n, of in rewards.items()})


def read_samples(path: Path) -> Iterator[Sample]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    form, plain = TypeAdapter(Sample), TypeAdapter(dict[str, Any])
    try:
        with opened(path, "rb") as stream:
            data = stream.read(LARGEST)
    except (gzip.BadGzipFile, EOFError) as error:
        raise MalformedFile(f"{path} is no complete gzip file: {error}") from None
    for number, line in enumerate(decoded(data, path).splitlines(), start=1):
        source, remedy = f"{path}, line {number}", "a line is {prompt, oracle, rewards}"
        if '"rewards"' not in line:
            older = parse_json(plain, line, source, remedy)
            if not {"t", "o"} <= older.keys():
                raise MalformedFile(f"{source} has the keys {sorted(older)}; {remedy}")
            rewards = {OLDER.get(key, key): older[key] for key in older if key not in ("t", "o")}
            yield form.validate_python({"prompt": older["t"], "oracle": older["o"], "rewards": rewards})
        else:
            yield parse_json(form, line, source, remedy)


def line_of(sample: Sample) -> str:
    return TypeAdapter(Sample).dump_json(sample).decode() + "\n"
