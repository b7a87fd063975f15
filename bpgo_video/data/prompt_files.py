"""Prompt inputs read into checked lines, and the plan of a build over them.

    .txt            one prompt per line
    .jsonl          one object per line with the columns of FIELDS; only a prompt is required
    .csv, .tsv      the same columns; the first line names them, "|" separates tags, empty cells are absent
    .parquet        the same columns, read with pyarrow
    .json           VBench's list of {"prompt_en", "dimension"?, ...}: dimensions become tags, other entries become
                    "info"; entries with equal prompts are merged, because VBench names videos by prompt. Or a list of
                    objects with the columns above; each caption of a "cap" (FastVideo) is a prompt
    FOLDER          its metadata.csv, .tsv, .jsonl or .parquet; its files of training and test prompts, which are held
                    out; or a data set for the `datasets` library
    OWNER/NAME      a data set of the Hugging Face hub, through `datasets`: OWNER/NAME[/CONFIG][:SPLIT]

Files but .json are streamed: one line or a few rows are in memory at a time; a line has at most 1 MiB.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from bpgo_video.data import FIELDS, HELDOUT, MAX_CHARACTERS, Columns, column_flag
from bpgo_video.data.media import MEDIA
from bpgo_video.data.records import PromptRecord, prompt_id
from bpgo_video.data.statistics import NearDuplicates, held_out
from bpgo_video.documents import MalformedFile, decoded, plain_json, read_text
from bpgo_video.errors import InputError

FROM_TEXT: Mapping[type, Callable[[str], Any]] = {int: int, list: lambda text: text.split("|")}
SAVED = ("state.json", "dataset_dict.json")  # of `datasets.save_to_disk`
LISTS = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
PARTS = (".txt", ".jsonl", "_metadata.jsonl")  # of train and test in a folder: flow_grpo, DiffusionNFT, Flow-Factory
MAX_LINE = 2**20  # bytes
MAX_LIST = 2**26  # bytes of a .json file, which is read whole
ROWS_AT_ONCE = 64  # of a parquet file, which may hold images
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tab and line breaks
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(.+))?")


class PromptFileError(InputError):
    """A prompt file that cannot be used; the message names the file and the line."""


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
            yield from checked_lines(_dataset_rows(name), dict, _dataset_folders(name), columns or {}, max_characters)


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


def numbered_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line of a file and its FILE:LINE. Raises PromptFileError at a line over 1 MiB."""
    number = 0
    with path.open("rb") as stream:
        while line := stream.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise PromptFileError(f"{path}:{number}: the line is longer than 1 MiB; is this a prompt file?")
            yield f"{path}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _json_object(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise ValueError("the line is empty; remove it")
    content = plain_json(line, "the line")
    if not isinstance(content, dict):
        raise ValueError("each line must be an object")
    return content


def _table_rows(path: Path, delimiter: str = ",") -> Iterator[tuple[str, dict[Any, Any]]]:
    lines = (line.decode("utf-8", "surrogateescape") for _, line in numbered_lines(path))
    rows = csv.DictReader(lines, strict=True, delimiter=delimiter)
    try:
        names = rows.fieldnames or []
        if twice := [name for name in names if names.count(name) > 1]:
            raise PromptFileError(f"{path}:1: two columns have the name {twice[0]!r}; rename or remove one")
        yield from ((f"{path}:{rows.line_num}", row) for row in rows)
    except csv.Error as error:
        raise PromptFileError(f"{path}:{rows.reader.line_num}: {error}") from error


def _table_cells(row: dict[Any, Any]) -> dict[str, Any]:
    if None in row or None in row.values():  # DictReader's mark of too many or too few
        raise ValueError("the line has another number of cells than the first line")
    return {name: cell or None for name, cell in row.items()}


def _needed(module: str, name: Path | str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise PromptFileError(f"{name}: {error}; install what reads it: pip install 'bpgo-video[datasets]'") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    parquet = _needed("pyarrow.parquet", path)
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=ROWS_AT_ONCE)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(rows))
    except (OSError, ValueError) as error:  # pyarrow's errors are kinds of both
        raise PromptFileError(f"{path}: {error}") from error


def _dataset_folders(name: str) -> list[Path]:
    """Where a data set's own files are: its folder, or what the hub's client has copied of it."""
    folders = [Path(part) for part in (name, name.partition(":")[0]) if Path(part).is_dir()]
    if folders:
        return folders[:1]
    if (hub_id := HUB_ID.fullmatch(name)) is None:
        raise PromptFileError(f"{name} does not exist; give a file, a folder, or a data set OWNER/NAME of the hub")
    datasets, hub = _needed("datasets", name), _needed("huggingface_hub.constants", name)
    copied = Path(hub.HF_HUB_CACHE, f"datasets--{hub_id[1].replace('/', '--')}")
    return [copied, Path(datasets.config.EXTRACTED_DATASETS_PATH)]


def _dataset_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a folder or hub data set of the `datasets` library; images and videos as they are stored."""
    folder, _, split = (name, "", "") if Path(name).is_dir() else name.partition(":")
    hub_id = HUB_ID.fullmatch(name)
    datasets, on_disk = _needed("datasets", name), any((Path(folder) / file).is_file() for file in SAVED)
    source = (hub_id[1], hub_id[2]) if hub_id and not Path(folder).is_dir() else (folder,)
    try:
        data = datasets.load_from_disk(folder) if on_disk else datasets.load_dataset(*source, split=split or None)
    except (OSError, ValueError) as error:
        raise PromptFileError(f"{name} cannot be read as a data set: {error}") from error
    splits = data if isinstance(data, dict) else {"" if on_disk else split: data}
    if split not in splits and (split or len(splits) > 1):
        raise PromptFileError(f"{name}: its splits are {', '.join(splits) or 'none'}; name one, as in {folder}:train")
    data = splits[split] if split in splits else next(iter(splits.values()))
    for column, feature in data.features.items():
        if type(feature).__name__ in ("Image", "Video"):
            data = data.cast_column(column, type(feature)(decode=False))
    yield from ((f"{name}[{number}]", row) for number, row in enumerate(data))


def _json_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Entries of VBench's list by prompt, as lists; of another list the entries themselves, one for each caption."""
    try:
        entries = plain_json(read_text(path, MAX_LIST), path)
    except MalformedFile as error:
        raise PromptFileError(str(error)) from error
    if not isinstance(entries, list):
        raise PromptFileError(
            f'{path}: a .json file must hold VBench\'s list of {{"prompt_en", "dimension"}}, or a list of objects with '
            'a "prompt", "caption" or "cap"'
        )
    if not any(isinstance(entry, dict) and "prompt_en" in entry for entry in entries):
        for number, entry in enumerate(entries):
            captions = entry.pop("cap", None) if isinstance(entry, dict) else None
            texts = captions if isinstance(captions, list) else [captions]
            for text in texts:
                yield f"{path}[{number}]", entry if captions is None else {**entry, "caption": text}
        return
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


def _json_fields(entry: Any) -> dict[str, Any]:
    """Columns of an entry of `_json_entries`."""
    if isinstance(entry, list):
        return _vbench_fields(entry)
    if not isinstance(entry, dict):
        raise ValueError("each entry must be an object")
    return entry


Entries = Callable[[Path], Iterator[tuple[str, Any]]]
FORMATS: Mapping[str, tuple[Entries, Callable[[Any], dict[str, Any]]]] = {  # extension -> entries, columns of an entry
    ".txt": (numbered_lines, lambda line: {"prompt": decoded(line, "the line")}),
    ".jsonl": (numbered_lines, _json_object),
    ".csv": (_table_rows, _table_cells),
    ".tsv": (partial(_table_rows, delimiter="\t"), _table_cells),
    ".parquet": (_parquet_rows, dict),
    ".json": (_json_entries, _json_fields),
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
