"""The formats of prompt inputs, each read into places (FILE:LINE or FILE[ROW]) and values by column.

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
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from bpgo_video.documents import MalformedFile, decoded, plain_json, read_text
from bpgo_video.errors import InputError

SAVED = ("state.json", "dataset_dict.json")  # of `datasets.save_to_disk`
MAX_LINE = 2**20  # bytes
MAX_LIST = 2**26  # bytes of a .json file, which is read whole
ROWS_AT_ONCE = 64  # of a parquet file, which may hold images
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::(.+))?")


class PromptFileError(InputError):
    """A prompt file that cannot be used; the message names the file and the line."""


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


def dataset_folders(name: str) -> list[Path]:
    """Where a data set's own files are: its folder, or what the hub's client has copied of it."""
    folders = [Path(part) for part in (name, name.partition(":")[0]) if Path(part).is_dir()]
    if folders:
        return folders[:1]
    if (hub_id := HUB_ID.fullmatch(name)) is None:
        raise PromptFileError(f"{name} does not exist; give a file, a folder, or a data set OWNER/NAME of the hub")
    datasets, hub = _needed("datasets", name), _needed("huggingface_hub.constants", name)
    copied = Path(hub.HF_HUB_CACHE, f"datasets--{hub_id[1].replace('/', '--')}")
    return [copied, Path(datasets.config.EXTRACTED_DATASETS_PATH)]


def dataset_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
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
