"""Where are the records of a shard? Found by one pass over its tar headers; of the contents only the JSON is read."""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any, cast

from bpgo_video.data.prompt_records import MEDIA, ShardError, damaged, parse_header

MEDIA_NAMES = "|".join(rf"{kind}\.(?:{'|'.join(extensions)})" for kind, extensions in MEDIA.items())
MEMBER = re.compile(rf"[0-9A-Za-z-]+\.(?:json|safetensors|{MEDIA_NAMES}|clip\.safetensors)")
TAR_BLOCK = 512


@dataclass
class ShardTable:
    """Every record of one shard, in machine integers: 33 bytes a prompt, whatever its embeddings weigh.

    Attributes:
        starts, stops: the record's bytes [start, stop).
        images: 1 where the record has an image, else 0.
    """

    ids: array = field(default_factory=lambda: array("q"))
    splits: array = field(default_factory=lambda: array("q"))
    starts: array = field(default_factory=lambda: array("q"))
    stops: array = field(default_factory=lambda: array("q"))
    images: array = field(default_factory=lambda: array("b"))


def scan_shard(path: Path, count: int, split_codes: Mapping[str, int]) -> ShardTable:
    """Find every record of a tar file.

    Args:
        count: the number of records that it must hold.
        split_codes: the integer to write for each split.

    Raises:
        ShardError: the file is damaged or holds anything but the members of prompt records.
    """
    table, key = ShardTable(), "(the first)"
    for key, members, header in _records(path):
        if header["split"] not in split_codes:
            raise damaged(path, key, f"its split {header['split']!r} is not in index.json")
        last = max(members.values(), key=lambda member: member.offset)
        table.ids.append(header["id"])
        table.splits.append(split_codes[header["split"]])
        table.starts.append(min(member.offset for member in members.values()))
        table.stops.append(last.offset_data + -(-last.size // TAR_BLOCK) * TAR_BLOCK)
        table.images.append("image" in members)
    if len(table.ids) != count:
        raise damaged(path, key, f"the last of {len(table.ids)} that can be read; the index states {count}")
    return table


def read_headers(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON of every record of a shard; embeddings, images and videos stay unread. Raises as `scan_shard`."""
    return (header for _, _, header in _records(path))


def _records(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], dict[str, Any]]]:
    key = "(the first)"
    try:
        with tarfile.open(path, "r:") as tar:
            for key, group in groupby(_members(path, tar), key=_key):
                members = _by_kind(path, key, group)
                yield key, members, parse_header(cast(IO[bytes], tar.extractfile(members["json"])).read())
    except (tarfile.TarError, json.JSONDecodeError, TypeError) as error:
        raise damaged(path, key, f"in or after it: {error}") from error


def _members(path: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        if MEMBER.fullmatch(member.name) is None or not member.isreg():
            raise ShardError(
                f"{path}: member {member.name!r} is refused: shards hold regular files KEY.json, "
                "KEY.safetensors, KEY.image.*, KEY.video.* and KEY.clip.safetensors only, and nothing is ever "
                "unpickled; build them again"
            )
        yield member


def _by_kind(path: Path, key: str, group: Iterable[tarfile.TarInfo]) -> dict[str, tarfile.TarInfo]:
    members: dict[str, tarfile.TarInfo] = {}
    for member in group:
        kind = member.name.split(".")[1]
        if kind in members:
            raise damaged(path, key, f"it has two members of the kind {kind!r}")
        members[kind] = member
    for kind in ("json", "safetensors"):
        if kind not in members:
            raise damaged(path, key, f"the file ends, or the next record begins, before its {kind}")
    return members


def _key(member: tarfile.TarInfo) -> str:
    return member.name.split(".")[0]
