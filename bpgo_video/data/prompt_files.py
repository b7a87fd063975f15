"""Prompt files (.txt, .jsonl, .csv, VBench's .json) read into checked lines, and the plan of a build over them.

    .txt     one prompt per line
    .jsonl   one object per line with FIELDS; only "prompt" is required
    .csv     the same fields except "info"; the first line names the columns, "|" separates tags, empty cells are absent
    .json    VBench's list of {"prompt_en", "dimension"?, ...}: dimensions become tags, other entries become "info";
             entries with equal prompts are merged, because VBench names videos by prompt

All formats but .json are streamed: one line is in memory at a time, at most 1 MiB long.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from bpgo_video.data.media import MEDIA
from bpgo_video.data.records import PromptRecord

FIELDS: Mapping[str, type] = {
    "prompt": str,
    "negative_prompt": str,
    "id": int,
    "split": str,
    "tags": list,
    "image": str,
    "video": str,
    "info": dict,
}
COLUMNS = FIELDS.keys() - {"info"}
MAX_LINE = 2**20  # bytes
MAX_CHARACTERS = 2000  # of a prompt: about 512 tokens of English; encoders drop the rest
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tab and line breaks


class PromptFileError(ValueError):
    """A prompt file that cannot be used; the message names the file and the line."""


class Rejected(NamedTuple):
    """A prompt that cannot be used: FILE:LINE, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Line:
    """A checked prompt without embeddings, its FILE:LINE, and the paths of its image and video."""

    record: PromptRecord
    place: str
    media: Mapping[str, Path] = field(default_factory=dict)


def prompt_id(prompt: str) -> int:
    """The default id of a prompt: 63 bits of the blake2b hash of its text."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 1


def read_lines(
    inputs: Iterable[Path | str], split: str = "train", max_characters: int = MAX_CHARACTERS
) -> Iterator[Line | Rejected]:
    """Every prompt of the files in order, or the reason why it cannot be used.

    Args:
        split: for prompts that do not name one.
        max_characters: longer prompts are rejected.

    Raises:
        PromptFileError: a file cannot be read at all: unknown format, missing, a line over 1 MiB, a CSV file without
            the column "prompt", a .json file that is not a list.
    """
    for path in map(Path, inputs):
        if path.suffix not in FORMATS:
            raise PromptFileError(f"{path}: the format {path.suffix!r} is unknown; give {', '.join(FORMATS)}")
        if not path.is_file():
            raise PromptFileError(f"{path} does not exist")
        entries, parse = FORMATS[path.suffix]
        yield from checked_lines(entries(path), parse, path.parent, split, max_characters)


def checked_lines(
    entries: Iterable[tuple[str, Any]],
    parse: Callable[[Any], dict[str, Any]],
    folder: Path,
    split: str,
    max_characters: int,
) -> Iterator[Line | Rejected]:
    """Check each (place, entry) after `parse` turned the entry into FIELDS; media paths are relative to `folder`."""
    for place, entry in entries:
        try:
            yield _checked(place, {"split": split, **parse(entry)}, folder, max_characters)
        except (ValueError, csv.Error, RecursionError) as error:  # includes errors of UTF-8 and JSON
            yield Rejected(place, str(error))


def _checked(place: str, fields: Mapping[str, Any], folder: Path, max_characters: int) -> Line:
    for name, value in fields.items():
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r}; the fields are {', '.join(FIELDS)}")
        if type(value) is not FIELDS[name]:
            raise ValueError(f"{name!r} is {value!r}, which is not of type {FIELDS[name].__name__}")
    prompt, split, tags = fields["prompt"].strip(), fields["split"], tuple(fields.get("tags", ()))
    negative = fields["negative_prompt"].strip() if "negative_prompt" in fields else None
    for name, text in (("prompt", prompt), ("split", split)):
        if not text:
            raise ValueError(f"the {name} is empty; remove it")
    for name, text in (("prompt", prompt), ("negative prompt", negative or "")):
        if len(text) > max_characters:
            raise ValueError(f"the {name} has {len(text)} characters; the limit is {max_characters}")
    for text in (prompt, negative or "", split, *tags):
        if not isinstance(text, str):
            raise ValueError(f"the tag {text!r} is not a string")
        if found := UNPRINTABLE.search(text):
            code = ord(found[0])
            kind = "text that is not UTF-8" if code >= 0xD800 else "a control character"
            raise ValueError(f"character {found.start() + 1} of {text[:60]!r} is U+{code:04X}, {kind}; remove it")
    key = fields.get("id", prompt_id(prompt))
    if not 0 <= key < 2**63:
        raise ValueError(f"the id is {key}; ids go from 0 to 2^63 - 1")
    record = PromptRecord(key, prompt, split, tags, negative, info=fields.get("info", {}))
    return Line(record, place, {kind: _media_path(folder, fields[kind]) for kind in MEDIA if kind in fields})


def _media_path(folder: Path, name: str) -> Path:
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        raise ValueError(f"the path {name!r} leads out of the folder of the prompt file; move the file into it")
    if not (folder / path).is_file():
        raise ValueError(f"the file {folder / path} does not exist")
    return folder / path


def numbered_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line of a file and its FILE:LINE. Raises PromptFileError at a line over 1 MiB."""
    number = 0
    with path.open("rb") as stream:
        while line := stream.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise PromptFileError(f"{path}:{number}: the line is longer than 1 MiB; is this a prompt file?")
            yield f"{path}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def json_object(line: bytes, *required: str) -> dict[str, Any]:
    """The object on a line of JSON. Raises ValueError if the line is something else or lacks a required field."""
    if not line.strip():
        raise ValueError("the line is empty; remove it")
    content = json.loads(line.decode("utf-8"))
    if not isinstance(content, dict) or not content.keys() >= set(required):
        names = " and a ".join(f'"{name}"' for name in required)
        raise ValueError(f"each line must be an object with a {names}")
    return content


def _csv_rows(path: Path) -> Iterator[tuple[str, tuple[list[str], list[str] | csv.Error]]]:
    rows = csv.reader((line.decode("utf-8", "surrogateescape") for _, line in numbered_lines(path)), strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise PromptFileError(f"{path}: the first line cannot be read: {error}") from error
    if "prompt" not in header or not set(header) <= COLUMNS:
        raise PromptFileError(
            f"{path}: the first line must name the columns, 'prompt' and any of {', '.join(sorted(COLUMNS))}, "
            f"not {header}"
        )
    while True:
        row: list[str] | csv.Error
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            row = error
        yield f"{path}:{rows.line_num}", (header, row)


def _csv_fields(entry: tuple[list[str], list[str] | csv.Error]) -> dict[str, Any]:
    header, cells = entry
    if isinstance(cells, csv.Error):
        raise cells
    if len(cells) != len(header):
        raise ValueError(f"the line has {len(cells)} cells, the first line {len(header)}")
    fields: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    if "id" in fields:
        fields["id"] = int(fields["id"])
    if "tags" in fields:
        fields["tags"] = fields["tags"].split("|")
    return {"prompt": "", **fields}


def _vbench_entries(path: Path) -> Iterator[tuple[str, list[Any]]]:
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"{path}: {error}") from error
    if not isinstance(entries, list):
        raise PromptFileError(f'{path}: a .json file must hold VBench\'s list of {{"prompt_en", "dimension"}}')
    groups: dict[Any, tuple[str, list[Any]]] = {}
    for number, entry in enumerate(entries):
        prompt = entry.get("prompt_en") if isinstance(entry, dict) else None
        key = prompt if isinstance(prompt, str) else number
        groups.setdefault(key, (f"{path}[{number}]", []))[1].append(entry)
    yield from groups.values()


def _vbench_fields(entries: list[Any]) -> dict[str, Any]:
    """Fields of the entries with one prompt: lists and objects are united, all other values must be equal."""
    merged: dict[str, Any] = {}
    for entry in entries:
        if not isinstance(entry, dict) or "prompt_en" not in entry:
            raise ValueError('each entry must be an object with a "prompt_en"')
        for name, new in entry.items():
            old = merged.get(name, new)
            if isinstance(old, list) and isinstance(new, list):
                merged[name] = old + [value for value in new if value not in old]
            elif isinstance(old, dict) and isinstance(new, dict) and all(old[k] == new[k] for k in old.keys() & new):
                merged[name] = new | old
            elif old == new:
                merged[name] = new
            else:
                raise ValueError(f"two entries with this prompt contradict each other: {name!r} is {old} and {new}")
    info = {name: value for name, value in merged.items() if name not in ("prompt_en", "dimension")}
    return {"prompt": merged["prompt_en"], "tags": merged.get("dimension", []), "info": info}


Entries = Callable[[Path], Iterator[tuple[str, Any]]]
FORMATS: Mapping[str, tuple[Entries, Callable[[Any], dict[str, Any]]]] = {  # extension -> entries, fields of an entry
    ".txt": (numbered_lines, lambda line: {"prompt": line.decode("utf-8")}),
    ".jsonl": (numbered_lines, lambda line: json_object(line, "prompt")),
    ".csv": (_csv_rows, _csv_fields),
    ".json": (_vbench_entries, _vbench_fields),
}


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
        digest: sha256 of all input, with media represented by their names.
    """

    read: Callable[[], Iterable[Line | Rejected]]
    on_error: str
    count: int
    rejected: int
    duplicates: frozenset[int]
    repeated: frozenset[int]
    digest: str

    def lines(self) -> Iterator[Line | Rejected]:
        """One pass over the input, in which later uses of an id are rejected."""
        number = 0
        for line in self.read():
            if isinstance(line, Line):
                if number in self.duplicates:
                    line = Rejected(line.place, f"its id {line.record.id} is that of an earlier prompt")
                number += 1
            yield line


def make_plan(
    inputs: Iterable[Path | str],
    split: str = "train",
    max_characters: int = MAX_CHARACTERS,
    on_error: str = "stop",
    show_progress: bool = False,
    read: Callable[..., Iterable[Line | Rejected]] = read_lines,
) -> Plan:
    """Read all of the input once, keeping 24 bytes per prompt.

    Args:
        on_error: "stop" raises at the first prompt that cannot be used; "skip" leaves it out and counts it.
        read: reads `inputs` as `read_lines` does.

    Raises:
        PromptFileError: from `read`; the input holds no prompt; with "stop", a prompt cannot be used or two have one
            id. The message names the lines.
    """
    inputs = tuple(map(Path, inputs))
    read_again = partial(read, inputs, split=split, max_characters=max_characters)
    digest, rejected, keys = hashlib.sha256(), 0, array("q")
    for line in tqdm(read_again(), desc="lines", disable=not show_progress):
        if isinstance(line, Rejected):
            rejected += 1
            if on_error == "stop":
                raise PromptFileError(f"{line.place}: {line.reason}")
            continue
        record, media = line.record, {kind: str(path) for kind, path in line.media.items()}
        negative = [] if record.negative_prompt is None else [record.negative_prompt]
        fields = [record.id, record.prompt, record.split, record.tags, record.info, media, *negative]
        digest.update(json.dumps(fields).encode() + b"\n")
        keys.extend((record.id, prompt_id(record.prompt), prompt_id(negative[0]) if negative else -1))
    if not keys:
        raise PromptFileError(f"there are no prompts in {', '.join(map(str, inputs))}")
    table = np.frombuffer(keys, dtype=np.int64).reshape(-1, 3)
    _, first_uses = np.unique(table[:, 0], return_index=True)
    duplicates = np.setdiff1d(np.arange(len(table)), first_uses)
    if len(duplicates) and on_error == "stop":
        raise PromptFileError(_same_id(read_again(), int(table[duplicates[0], 0])))
    texts, uses = np.unique(np.delete(table, duplicates, axis=0)[:, 1:], return_counts=True)
    return Plan(
        read=read_again,
        on_error=on_error,
        count=len(first_uses),
        rejected=rejected + len(duplicates),
        duplicates=frozenset(duplicates.tolist()),
        repeated=frozenset(texts[(uses > 1) & (texts >= 0)].tolist()),
        digest=digest.hexdigest(),
    )


def _same_id(lines: Iterable[Line | Rejected], key: int) -> str:
    first, second, *_ = (line for line in lines if isinstance(line, Line) and line.record.id == key)
    return (
        f"{first.place} and {second.place} have the same id {key} ({first.record.prompt!r} and "
        f"{second.record.prompt!r}); remove one line, or give it another id in a .jsonl file"
    )


def read_prompts(inputs: Iterable[Path | str], split: str = "train") -> list[Line]:
    """Every prompt of the files, in order. Raises PromptFileError as `make_plan` with "stop"."""
    return [line for line in make_plan(inputs, split).lines() if isinstance(line, Line)]
