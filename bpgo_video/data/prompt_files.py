"""What prompts do files hold? Text, JSON lines, CSV and VBench's list are read a prompt at a time; bad ones are named.

    .txt     a prompt a line
    .jsonl   an object a line: FIELDS, of which only "prompt" must be there
    .csv     the same fields, without "info", as columns named in the first line; tags are separated by "|", an empty
             cell says nothing
    .json    VBench's list of {"prompt_en", "dimension"?, ...}: dimensions become tags, the rest becomes "info"; equal
             prompts become one (VBench names videos by prompt)

All but .json are streamed: one line is in memory at a time, at most 1 MiB long.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from bpgo_video.data.prompt_records import MEDIA, PromptRecord

FIELDS: Mapping[str, type] = MappingProxyType(
    {
        "prompt": str,
        "negative_prompt": str,
        "id": int,
        "split": str,
        "tags": list,
        "image": str,
        "video": str,
        "info": dict,
    }
)
MAX_LINE = 2**20  # bytes
MAX_CHARACTERS = 2000  # of a prompt: about 512 tokens of English, beyond which encoders drop the rest
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tab and line breaks


class PromptFileError(ValueError):
    """A prompt file that cannot be used as it is; the message names the file and the line."""


class Rejected(NamedTuple):
    """A prompt that cannot be used, by its place in the input."""

    place: str
    reason: str


@dataclass(frozen=True)
class Line:
    """A prompt, not yet encoded, the place it comes from, and the files of its image and video."""

    record: PromptRecord
    place: str
    media: Mapping[str, Path] = field(default_factory=dict)


def prompt_id(prompt: str) -> int:
    """A prompt's default id: 63 bits of the blake2b hash of its text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 1


def read_lines(
    inputs: Iterable[Path | str], split: str = "train", max_characters: int = MAX_CHARACTERS
) -> Iterator[Line | Rejected]:
    """Every prompt of the files, in order, or why it cannot be used.

    Args:
        split: of the prompts that do not name one.
        max_characters: longer prompts are rejected.

    Raises:
        PromptFileError: a file that cannot be read at all: of an unknown kind, missing, a line over 1 MiB, a CSV file
            without the column "prompt", a .json file that is no list.
    """
    for path in map(Path, inputs):
        if path.suffix not in FORMATS:
            raise PromptFileError(f"{path}: prompts are read from {', '.join(FORMATS)}, not {path.suffix!r}")
        if not path.is_file():
            raise PromptFileError(f"{path} does not exist")
        entries, parse = FORMATS[path.suffix]
        for place, entry in entries(path):
            try:
                yield checked_line(place, {"split": split, **parse(entry)}, path.parent, max_characters)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                yield Rejected(place, str(error))


def read_prompts(inputs: Iterable[Path | str], split: str = "train") -> Iterator[Line]:
    """Every prompt of the files, in order. Raises PromptFileError at the first that cannot be used."""
    for line in read_lines(inputs, split):
        if isinstance(line, Rejected):
            raise PromptFileError(f"{line.place}: {line.reason}")
        yield line


def checked_line(place: str, fields: Mapping[str, Any], folder: Path, max_characters: int) -> Line:
    """The prompt that these fields of FIELDS describe, with its media's paths relative to `folder`.

    Raises:
        ValueError: a field cannot be used; the message says why.
    """
    for name, value in fields.items():
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r}; known are {', '.join(FIELDS)}")
        if type(value) is not FIELDS[name]:
            raise ValueError(f"{name!r} is {value!r}, which is not of type {FIELDS[name].__name__}")
    prompt, tags = fields["prompt"].strip(), tuple(fields.get("tags", ()))
    for name, text in (("prompt", prompt), ("split", fields["split"])):
        if not text:
            raise ValueError(f"the {name} is empty; remove it")
    negative = fields["negative_prompt"].strip() if "negative_prompt" in fields else None
    for name, text in (("prompt", prompt), ("negative prompt", negative or "")):
        if len(text) > max_characters:
            raise ValueError(f"the {name} has {len(text)} characters; at most {max_characters} are read")
    for text in (prompt, negative or "", fields["split"], *tags):
        _check_text(text)
    key = fields.get("id", prompt_id(prompt))
    if not 0 <= key < 2**63:
        raise ValueError(f"the id is {key}; ids go from 0 to 2^63 - 1")
    record = PromptRecord(key, prompt, fields["split"], tags, negative, info=fields.get("info", {}))
    return Line(record, place, {kind: _media_path(folder, fields[kind]) for kind in MEDIA if kind in fields})


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"the tag {text!r} is no text")
    if found := UNPRINTABLE.search(text):
        code = ord(found[0])
        kind = "text that is not UTF-8" if code >= 0xD800 else "a control character"
        raise ValueError(f"character {found.start() + 1} of {text[:60]!r} is U+{code:04X}, {kind}; remove it")


def _media_path(folder: Path, name: str) -> Path:
    """A file named relative to the prompt file's folder, and not outside of it."""
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
        raise ValueError(f"the path {name!r} leads out of the folder of the prompt file; put the file into it")
    if not (folder / inside).is_file():
        raise ValueError(f"the file {folder / inside} does not exist")
    return folder / inside


def numbered_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line of a file and its place, FILE:NUMBER. Raises PromptFileError at a line over 1 MiB."""
    number = 0
    with path.open("rb") as stream:
        while line := stream.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise PromptFileError(f"{path}:{number}: the line is longer than 1 MiB; is this a file of prompts?")
            yield f"{path}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _rows(path: Path) -> Iterator[tuple[str, tuple[list[str], list[str] | csv.Error]]]:
    rows = csv.reader((line.decode("utf-8", "surrogateescape") for _, line in numbered_lines(path)), strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise PromptFileError(f"{path}: its first line cannot be read: {error}") from error
    if "prompt" not in header or not set(header) <= COLUMNS:
        raise PromptFileError(
            f"{path}: its first line must name the columns, 'prompt' and any of {', '.join(sorted(COLUMNS))}, "
            f"not {header}"
        )
    while True:
        row: list[str] | csv.Error | None
        try:
            row = next(rows, None)
        except csv.Error as error:
            row = error
        if row is None:
            return
        yield f"{path}:{rows.line_num}", (header, row)


def _vbench(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PromptFileError(f"{path}: {error}") from error
    if not isinstance(entries, list):
        raise PromptFileError(f'{path}: a .json file holds VBench\'s list of {{"prompt_en", "dimension"}}')
    merged: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, entry in enumerate(entries):
        place = f"{path}[{number}]"
        prompt = entry.get("prompt_en") if isinstance(entry, dict) else None
        if isinstance(prompt, str) and prompt not in merged:
            merged[prompt] = (place, entry)
        elif not isinstance(prompt, str) or not _merge(merged[prompt][1], entry):
            yield place, entry
    yield from merged.values()


def _merge(entry: dict[str, Any], other: Mapping[str, Any]) -> bool:
    """Add another entry's lists and objects; False, and nothing added, where the two contradict each other."""
    merged = {**other, **entry}
    for name in entry.keys() & other.keys():
        one, two = entry[name], other[name]
        if isinstance(one, list) and isinstance(two, list):
            merged[name] = one + [value for value in two if value not in one]
        elif isinstance(one, dict) and isinstance(two, dict) and all(one[k] == two[k] for k in one.keys() & two.keys()):
            merged[name] = two | one
        elif one != two:
            return False
    entry.update(merged)
    return True


def _text_fields(line: bytes) -> dict[str, Any]:
    return {"prompt": line.decode("utf-8")}


def json_object(line: bytes, *required: str) -> dict[str, Any]:
    """The object that a line of JSON holds. Raises ValueError where it is none, or lacks a required field."""
    if not line.strip():
        raise ValueError("the line is empty; remove it")
    content = json.loads(line.decode("utf-8"))
    if not isinstance(content, dict) or not content.keys() >= set(required):
        named = " and a ".join(f'"{name}"' for name in required)
        raise ValueError(f"each line must be an object with a {named}")
    return content


def _json_fields(line: bytes) -> dict[str, Any]:
    return json_object(line, "prompt")


def _csv_fields(row: tuple[list[str], list[str] | csv.Error]) -> dict[str, Any]:
    header, cells = row
    if isinstance(cells, csv.Error):
        raise ValueError(str(cells)) from cells
    if len(cells) != len(header):
        raise ValueError(f"the line has {len(cells)} cells, the first line {len(header)}")
    named = dict(zip(header, cells, strict=True))
    fields = {name: CELLS.get(name, str)(cell) for name, cell in named.items() if cell}
    return {"prompt": "", **fields}


def _vbench_fields(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict) or "prompt_en" not in entry:
        raise ValueError('each entry must be an object with a "prompt_en"')
    info = {name: value for name, value in entry.items() if name not in ("prompt_en", "dimension")}
    return {"prompt": entry["prompt_en"], "tags": entry.get("dimension", []), "info": info}


COLUMNS = FIELDS.keys() - {"info"}
CELLS: Mapping[str, Callable[[str], Any]] = MappingProxyType({"id": int, "tags": lambda cell: cell.split("|")})
FORMATS: Mapping[str, tuple[Callable[[Path], Iterator[tuple[str, Any]]], Callable[[Any], dict[str, Any]]]] = (
    MappingProxyType(  # extension -> (the entries of a file and their places, the fields of an entry)
        {
            ".txt": (numbered_lines, _text_fields),
            ".jsonl": (numbered_lines, _json_fields),
            ".csv": (_rows, _csv_fields),
            ".json": (_vbench, _vbench_fields),
        }
    )
)
