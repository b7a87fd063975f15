"""Prompt inputs, in the formats of `prompt_formats.py`, read into checked lines."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from bpgo_video.data import FIELDS, HELDOUT, MAX_CHARACTERS, Columns, column_flag
from bpgo_video.data.media import MEDIA
from bpgo_video.data.prompt_formats import FORMATS, PromptFileError, dataset_folders, dataset_rows
from bpgo_video.data.records import PromptRecord, prompt_id

FROM_TEXT: Mapping[type, Callable[[str], Any]] = {int: int, list: lambda text: text.split("|")}
LISTS = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
PARTS = (".txt", ".jsonl", "_metadata.jsonl")  # of train and test in a folder: flow_grpo, DiffusionNFT, Flow-Factory
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tab and line breaks


class Rejected(NamedTuple):
    """A prompt that cannot be used: FILE:LINE, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Line:
    """A checked prompt without embeddings.

    Attributes:
        record: its split is empty if the input names none.
        place: FILE:LINE or FILE[ROW].
        media: path or content of its image and video.
        unused: columns that were not read.
    """

    record: PromptRecord
    place: str
    media: Mapping[str, Path | bytes] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


def read_lines(
    inputs: Iterable[Path | str], columns: Columns | None = None, max_characters: int = MAX_CHARACTERS
) -> Iterator[Line | Rejected]:
    """Every prompt of the inputs in order, or the reason why it cannot be used.

    Args:
        columns: to read instead of those of FIELDS; a row must have one of each field's, and no columns skip a field.
        max_characters: longer prompts are rejected.

    Raises:
        PromptFileError: an input cannot be read at all: unknown format, missing, a line over 1 MiB, no such split.
    """
    for name in map(str, inputs):
        path = Path(name)
        if train_and_test := split_files(path):
            for split, part in train_and_test.items():
                for line in read_lines([part], columns, max_characters):
                    yield _in_split(line, split) if isinstance(line, Line) else line
            continue
        path = list_of(path) or path
        if path.is_file() or path.suffix in FORMATS:
            if path.suffix not in FORMATS:
                raise PromptFileError(f"{path}: the format {path.suffix!r} is unknown; give {', '.join(FORMATS)}")
            if not path.is_file():
                raise PromptFileError(f"{path} does not exist")
            entries, parse = FORMATS[path.suffix]
            yield from checked_lines(entries(path), parse, [path.parent], columns or {}, max_characters)
        else:
            yield from checked_lines(dataset_rows(name), dict, dataset_folders(name), columns or {}, max_characters)


def list_of(folder: Path) -> Path | None:
    """The file in a folder that lists its images or videos, if there is one."""
    return next(filter(Path.is_file, map(folder.joinpath, LISTS)), None)


def split_files(folder: Path) -> dict[str, Path]:
    """The files of training and of held-out prompts in a folder without a list of LISTS, by split; {} if not both.

    Raises:
        PromptFileError: there are several of one kind.
    """
    if list_of(folder):
        return {}
    found = {
        split: [path for path in (folder / f"{stem}{ending}" for ending in PARTS) if path.is_file()]
        for split, stem in (("train", "train"), (HELDOUT, "test"))
    }
    for paths in found.values():
        if len(paths) > 1:
            raise PromptFileError(f"{folder} holds {paths[0].name} and {paths[1].name}; give one file with --input")
    return {split: paths[0] for split, paths in found.items()} if all(found.values()) else {}


def _in_split(line: Line, split: str) -> Line:
    """The line in this split, unless it names one."""
    return replace(line, record=replace(line.record, split=line.record.split or split))


def checked_lines(
    entries: Iterable[tuple[str, Any]],
    parse: Callable[[Any], dict[str, Any]],
    folders: Sequence[Path],
    columns: Columns,
    max_characters: int,
) -> Iterator[Line | Rejected]:
    """Check each (place, entry) after `parse` turned the entry into values by column.

    Args:
        folders: in which images and videos must be; their paths are relative to the first.
    """
    for place, entry in entries:
        try:
            yield _checked(place, parse(entry), folders, columns, max_characters)
        except ValueError as error:  # includes errors of UTF-8 and JSON
            yield Rejected(place, str(error))


def _fields(row: Mapping[Any, Any], columns: Columns) -> tuple[dict[str, Any], frozenset[str]]:
    """The fields of a row, and the columns that were not read."""
    fields: dict[str, Any] = {}
    unused = set(row)
    for name, (kind, guesses) in FIELDS.items():
        names = columns.get(name, guesses)
        column = next((column for column in names if column in row), None)
        if column is None and names and (name in columns or name == "prompt"):
            raise ValueError(
                f"no column is named {' or '.join(names)}; the columns are {', '.join(map(str, row))}: "
                f"name one with {column_flag(name)}"
            )
        unused.discard(column)
        if (value := row.get(column)) is None:
            continue
        if isinstance(value, str) and kind in FROM_TEXT:
            value = FROM_TEXT[kind](value)
        if kind not in (object, type(value)):
            raise ValueError(f"{column!r} is {value!r}, which is not of type {kind.__name__}")
        fields[name] = value
    return fields, frozenset(unused)


def _checked(
    place: str, row: Mapping[Any, Any], folders: Sequence[Path], columns: Columns, max_characters: int
) -> Line:
    fields, unused = _fields(row, columns)
    prompt, split, tags = fields.get("prompt", "").strip(), fields.get("split"), tuple(fields.get("tags", ()))
    negative = fields["negative_prompt"].strip() if "negative_prompt" in fields else None
    texts = [("prompt", prompt), ("negative prompt", negative), ("split", split), *(("tag", tag) for tag in tags)]
    for name, text in texts:
        if text is None and name != "tag":
            continue
        if not isinstance(text, str):
            raise ValueError(f"the {name} {text!r} is not a string")
        if not text and name in ("prompt", "split"):
            raise ValueError(f"the {name} is empty; remove it")
        if len(text) > max_characters:
            raise ValueError(f"the {name} has {len(text)} characters; the limit is {max_characters}")
        if found := UNPRINTABLE.search(text):
            code = ord(found[0])
            kind = "text that is not UTF-8" if code >= 0xD800 else "a control character"
            raise ValueError(f"character {found.start() + 1} of {text[:60]!r} is U+{code:04X}, {kind}; remove it")
    key = fields.get("id", prompt_id(prompt))
    if not 0 <= key < 2**63:
        raise ValueError(f"the id is {key}; ids go from 0 to 2^63 - 1")
    record = PromptRecord(key, prompt, split or "", tags, negative, info=fields.get("info", {}))
    return Line(record, place, {kind: _media(folders, fields[kind]) for kind in MEDIA if kind in fields}, unused)


def _media(folders: Sequence[Path], value: Any) -> Path | bytes:
    """The content of an image or video, or its path. Tables hold either, or both as the `datasets` library does."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"an image or video is {value!r}; it must be a path or the bytes of a file")
    found = Path(os.path.normpath(folders[0] / value))
    if not any(Path(os.path.abspath(found)).is_relative_to(os.path.abspath(folder)) for folder in folders):
        raise ValueError(f"the path {value!r} leads out of the folder {folders[0]}; move the file into it")
    if not found.is_file():
        raise ValueError(f"the file {found} does not exist")
    return found
