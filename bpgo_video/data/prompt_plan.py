"""The plan of a build over prompt inputs: which prompts it writes, in which splits."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bpgo_video.data import HELDOUT
from bpgo_video.data.prompt_files import Line, Rejected, read_lines
from bpgo_video.data.prompt_formats import PromptFileError
from bpgo_video.data.records import prompt_id
from bpgo_video.data.statistics import NearDuplicates, held_out


@dataclass(frozen=True)
class Plan:
    """The prompts that a build writes, known before anything is encoded. Holds no texts.

    Attributes:
        read: starts a new pass over the input.
        on_error: "stop" or "skip", see `make_plan`.
        count: prompts to write.
        rejected: prompts left out.
        duplicates: usable lines, counted from 0, that are left out because an earlier line has their id.
        repeated: `prompt_id` of each text that several prompts share, negative prompts included.
        digest: sha256 of all input, with files of images and videos represented by their names.
        unused: columns of the input that are not read.
        split: of prompts that name none and are not held out.
        holdout: share of the prompts that are held out; 0 if the input has splits of its own.
        heldout: `prompt_id` of the held-out texts.
        has_splits: whether the input has splits of its own.
    """

    read: Callable[[], Iterable[Line | Rejected]]
    on_error: str
    count: int
    rejected: int
    duplicates: frozenset[int]
    repeated: frozenset[int]
    digest: str
    unused: frozenset[str]
    split: str
    holdout: float
    heldout: frozenset[int]
    has_splits: bool

    def lines(self) -> Iterator[Line | Rejected]:
        """One pass over the input, in which every prompt has its split, and later uses of an id are rejected."""
        number = 0
        for line in self.read():
            if isinstance(line, Line):
                record = line.record
                if number in self.duplicates:
                    line = Rejected(line.place, f"its id {record.id} is that of an earlier prompt")
                elif not record.split:
                    split = HELDOUT if self.heldout and prompt_id(record.prompt) in self.heldout else self.split
                    line = replace(line, record=replace(record, split=split))
                number += 1
            yield line


def make_plan(
    inputs: Iterable[Path | str],
    split: str = "train",
    on_error: str = "stop",
    holdout: float = 0.0,
    show_progress: bool = False,
    read: Callable[..., Iterable[Line | Rejected]] = read_lines,
    **reading: Any,
) -> Plan:
    """Read all of the input once, keeping 24 bytes per prompt, and 200 more and its words if prompts are held out.

    Args:
        split: for prompts that do not name one.
        on_error: "stop" raises at the first prompt that cannot be used; "skip" leaves it out and counts it.
        holdout: share of the prompts that get the split HELDOUT instead, see `held_out`; ignored if a prompt names one.
        read: reads `inputs` as `read_lines` does, with the arguments `reading`.

    Raises:
        PromptFileError: from `read`; no prompt; with "stop", a prompt that cannot be used, or two with one id.
    """
    inputs = tuple(inputs)
    read_again = partial(read, inputs, **reading)
    digest, keys, near = hashlib.sha256(), array("q"), NearDuplicates()
    rejected, first, unused, has_splits = 0, "", set[str](), False
    for line in tqdm(read_again(), desc="lines", disable=not show_progress):
        if isinstance(line, Rejected):
            if on_error == "stop":
                raise PromptFileError(f"{line.place}: {line.reason}")
            rejected, first = rejected + 1, first or f"; the first line is refused: {line.place}: {line.reason}"
            continue
        digest.update(_identity(line, split) + b"\n")
        record, negative = line.record, line.record.negative_prompt
        keys.extend((record.id, prompt_id(record.prompt), -1 if negative is None else prompt_id(negative)))
        unused |= line.unused
        has_splits |= bool(record.split)
        if holdout and not has_splits:
            near.add(record.prompt)
    if not keys:
        raise PromptFileError(f"there are no prompts in {', '.join(map(str, inputs))}{first}")
    table = np.frombuffer(keys, dtype=np.int64).reshape(-1, 3)
    _, first_uses = np.unique(table[:, 0], return_index=True)
    duplicates = np.setdiff1d(np.arange(len(table)), first_uses)
    if len(duplicates) and on_error == "stop":
        raise PromptFileError(_same_id(read_again(), int(table[duplicates[0], 0])))
    texts, uses = np.unique(np.delete(table, duplicates, axis=0)[:, 1:], return_counts=True)
    holdout = 0.0 if has_splits else holdout
    return Plan(
        read=read_again,
        on_error=on_error,
        count=len(first_uses),
        rejected=rejected + len(duplicates),
        duplicates=frozenset(duplicates.tolist()),
        repeated=frozenset(texts[(uses > 1) & (texts >= 0)].tolist()),
        digest=digest.hexdigest(),
        unused=frozenset(unused),
        split=split,
        has_splits=has_splits,
        holdout=holdout,
        heldout=held_out(table[:, 1], near.groups(), holdout) if holdout else frozenset(),
    )


def _identity(line: Line, split: str) -> bytes:
    """Everything of a line that the shards depend on."""
    record, media = line.record, {}
    for kind, source in line.media.items():
        media[kind] = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else str(source)
    negative = [] if record.negative_prompt is None else [record.negative_prompt]
    fields = [record.id, record.prompt, record.split or split, record.tags, record.info, media, *negative]
    return json.dumps(fields).encode()


def _same_id(lines: Iterable[Line | Rejected], key: int) -> str:
    first, second, *_ = (line for line in lines if isinstance(line, Line) and line.record.id == key)
    return (
        f"{first.place} and {second.place} have the same id {key} ({first.record.prompt!r} and "
        f"{second.record.prompt!r}); remove one line, or give it another id in a column `id`"
    )


def read_prompts(inputs: Iterable[Path | str], split: str = "train") -> list[Line]:
    """Every prompt of the files, in order. Raises PromptFileError as `make_plan` with "stop"."""
    return [line for line in make_plan(inputs, split).lines() if isinstance(line, Line)]
