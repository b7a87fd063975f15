"""The folder of a study: its settings, and a line for each finished run, so that a repeated command continues.

A line is written when its run ends. A line that a kill cut off is dropped, and its run repeated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from bpgo_video.documents import MAX_JSON, parse_json, read_json, read_text
from bpgo_video.errors import InputError, shown
from bpgo_video.files import write_json

SETTINGS, LINES, LOCK = "settings.json", "results.jsonl", ".lock"
GROWING = ("regimes", "arms")  # settings that may have further entries in a later call
Line = TypeVar("Line")


def open_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a study's folder after this call: those given, with further entries that the folder has.

    Raises:
        InputError: the folder has results of other settings; names the first one that differs.
    """
    path, given = folder / SETTINGS, json.loads(json.dumps(settings))
    stored = read_json(TypeAdapter(dict[str, Any]), path, "name another --output") if path.exists() else {}
    if stored and (change := first_difference(stored, given)):
        name, there, here = change
        raise InputError(
            f"{folder} has results with {name} = {shown(there)}, and this command has {shown(here)}; repeat it with "
            "the settings of the folder, or name another --output"
        )
    for name in GROWING:
        if name in given:
            given[name] = {**stored.get(name, {}), **given[name]}
    write_json(path, given)
    return dict(given)


class StudyFolder(Generic[Line]):
    """An open folder of a study.

    Args:
        form: the dataclass of a line.
        settings: everything that the lines depend on, as plain data.

    Attributes:
        settings: with the entries of earlier calls.
        lines: those that were there, then those that are added.

    Raises:
        InputError: as `open_settings`.
        MalformedFile: a line does not have the form.
    """

    def __init__(self, folder: Path, form: type[Line], settings: Mapping[str, Any]) -> None:
        self.folder, self._form = folder, TypeAdapter(form)
        self.settings = open_settings(folder, settings)
        self.lines: list[Line] = list(self._read())

    def _read(self) -> Iterator[Line]:
        path = self.folder / LINES
        if not path.exists():
            return
        text = read_text(path, MAX_JSON)
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole.encode()))
        for number, line in enumerate(whole.splitlines(), start=1):
            yield parse_json(self._form, line, f"{path}, line {number}", "delete the line, and its run is repeated")

    def add(self, line: Line) -> None:
        """Append a line, written through to the disk."""
        with (self.folder / LINES).open("a", encoding="utf-8") as stream:
            stream.write(self._form.dump_json(line).decode() + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.lines.append(line)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """A block in which no other process writes to the folder. Raises InputError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"another process writes a study to {folder}; wait for it, or name another --output") from None
    with lock:
        yield


def first_difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The dotted name and both values of the first setting that differs; one may lack entries of GROWING."""
    one, other = (
        {name: value for name, value in leaves(tree).items() if not _new(name, stored, given)}
        for tree in (stored, given)
    )
    names = (name for name in [*other, *one] if one.get(name) != other.get(name))
    return next(((name, one.get(name), other.get(name)) for name in names), None)


def leaves(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted names and values of everything in nested mappings."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
    return found


def _new(name: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether a setting belongs to an entry of GROWING that only one of the two has."""
    section, _, rest = name.partition(".")
    if section not in GROWING:
        return False
    entries = [
        {key for key in tree.get(section, {}) if rest == key or rest.startswith(f"{key}.")} for tree in (stored, given)
    ]
    return entries[0] != entries[1]
