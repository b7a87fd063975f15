"""Which prompts will a build write? Decided by one pass over the input, before anything is encoded.

Of each prompt 24 bytes stay in memory: its id, and hashes of its text and of its own negative prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bpgo_video.data.prompt_files import MAX_CHARACTERS, Line, PromptFileError, Rejected, prompt_id, read_lines

Progress = Callable[..., Iterable[Any]]  # tqdm, or what takes the same iterable, total and desc
Read = Callable[[], Iterable[Line | Rejected]]
ENTRY = np.dtype([("id", np.int64), ("text", np.int64), ("negative", np.int64)])
NONE = -1  # no hash is negative


def without_bar(iterable: Iterable[Any], total: int | None = None, desc: str = "") -> Iterable[Any]:
    """The Progress that shows nothing."""
    return iterable


@dataclass(frozen=True)
class Plan:
    """The prompts of a build.

    Attributes:
        read: what gives the prompts, once more at each call.
        on_error: "stop" or "skip", see `make_plan`.
        count: prompts to write.
        rejected: prompts left out.
        second: which of the readable prompts are left out, because an earlier one has their id; ascending.
        repeated: hashes of the texts, negative ones too, that several prompts have; ascending.
        digest: sha256 of everything that is read, media by their names.
    """

    read: Read
    on_error: str
    count: int
    rejected: int
    second: np.ndarray
    repeated: np.ndarray
    digest: str

    def lines(self) -> Iterator[Line | Rejected]:
        """What is read, with every second use of an id rejected."""
        number, left_out = 0, 0
        for line in self.read():
            if isinstance(line, Line):
                if left_out < len(self.second) and self.second[left_out] == number:
                    left_out += 1
                    line = Rejected(line.place, f"its id {line.record.id} is that of an earlier prompt")
                number += 1
            yield line

    def is_repeated(self, text: str) -> bool:
        key = prompt_id(text)
        place = int(np.searchsorted(self.repeated, key))
        return place < len(self.repeated) and int(self.repeated[place]) == key


def make_plan(
    inputs: Sequence[Path | str],
    split: str = "train",
    max_characters: int = MAX_CHARACTERS,
    on_error: str = "stop",
    progress: Progress = without_bar,
) -> Plan:
    """The plan of prompt files; see `plan_of`."""
    read = partial(read_lines, tuple(map(Path, inputs)), split, max_characters)
    return plan_of(read, f"prompts in {', '.join(map(str, inputs))}", on_error, progress)


def plan_of(read: Read, name: str, on_error: str = "stop", progress: Progress = without_bar) -> Plan:
    """Read all of the input once.

    Args:
        read: every prompt in order, or why it cannot be used; the same at each call.
        name: what is read, for messages.
        on_error: "stop" raises at the first prompt that cannot be used, "skip" leaves it out and counts it.

    Raises:
        PromptFileError: what `read` raises; no prompts at all; with "stop", a prompt that cannot be used, or two with
            one id, both named.
    """
    digest, rejected = hashlib.sha256(), 0

    def entries() -> Iterator[tuple[int, int, int]]:
        nonlocal rejected
        for line in progress(read(), desc="lines"):
            if isinstance(line, Rejected):
                rejected += 1
                if on_error == "stop":
                    raise PromptFileError(f"{line.place}: {line.reason}")
                continue
            record = line.record
            media = {kind: str(path) for kind, path in line.media.items()}
            fields = [record.id, record.prompt, record.split, record.tags, record.info, media]
            negative = NONE
            if record.negative_prompt is not None:
                fields.append(record.negative_prompt)
                negative = prompt_id(record.negative_prompt)
            digest.update(json.dumps(fields).encode() + b"\n")
            yield record.id, prompt_id(record.prompt), negative

    table = np.fromiter(entries(), dtype=ENTRY)
    if not len(table):
        raise PromptFileError(f"there are no {name}")
    order = np.argsort(table["id"], kind="stable")
    second = order[1:][np.diff(table["id"][order]) == 0]
    if len(second) and on_error == "stop":
        raise PromptFileError(_same_id(read, table["id"], int(second.min())))
    kept = np.delete(table, second)
    texts = np.sort(np.concatenate([kept["text"], kept["negative"][kept["negative"] != NONE]]))
    return Plan(
        read=read,
        on_error=on_error,
        count=len(kept),
        rejected=rejected + len(second),
        second=np.sort(second),
        repeated=np.unique(texts[1:][np.diff(texts) == 0]),
        digest=digest.hexdigest(),
    )


def _same_id(read: Read, ids: np.ndarray, second: int) -> str:
    first = int(np.flatnonzero(ids == ids[second])[0])
    readable = (line for line in read() if isinstance(line, Line))
    one, two = (line for number, line in enumerate(readable) if number in (first, second))
    return (
        f"{one.place} and {two.place} have the same id {one.record.id} ({one.record.prompt!r} and "
        f"{two.record.prompt!r}); remove one line, or give it another id in a .jsonl file"
    )
