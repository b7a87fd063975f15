"""Where are the records of a shard? Found by one pass over its tar headers; of the contents only the JSON is read."""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any, cast

from bpgo_video.data.prompt_records import CLIP, MEDIA, TENSORS, ShardError, Span, damaged, parse_header

MEDIA_NAMES = "|".join(rf"{kind}\.(?:{'|'.join(extensions)})" for kind, extensions in MEDIA.items())
TENSOR_NAMES = "|".join(map(re.escape, (*TENSORS.values(), CLIP)))
MEMBER = re.compile(rf"[0-9A-Za-z-]+\.(?:json|{TENSOR_NAMES}|{MEDIA_NAMES})")
TAR_BLOCK = 512


@dataclass
class ShardTable:
    """Every record of one shard, in machine integers: 65 bytes a prompt, whatever its embeddings weigh.

    Attributes:
        spans: start and stop of the record, of its conditioning and of its negative prompt's; the latter 0 where the
            negative prompt is the folder's.
        images: 1 where the record has an image, else 0.
    """

    ids: array = field(default_factory=lambda: array("q"))
    splits: array = field(default_factory=lambda: array("q"))
    spans: array = field(default_factory=lambda: array("q"))
    images: array = field(default_factory=lambda: array("b"))


def scan_shard(path: Path, count: int, split_codes: Mapping[str, int]) -> ShardTable:
    """Find every record of a tar file.

    Args:
        count: the number of records that it must hold.
        split_codes: the integer to write for each split.

    Raises:
        ShardError: the file is damaged or holds anything but the members of prompt records.
    """
    table, key, stored = ShardTable(), "(the first)", dict[str, Span]()
    for key, members, header in _records(path):
        if header["split"] not in split_codes:
            raise damaged(path, key, f"its split {header['split']!r} is not in index.json")
        table.ids.append(header["id"])
        table.splits.append(split_codes[header["split"]])
        for span in (_whole(members.values()), *_tensors(path, key, members, header, stored)):
            table.spans.extend(span)
        table.images.append("image" in members)
    if len(table.ids) != count:
        raise damaged(path, key, f"the last of {len(table.ids)} that can be read; the index states {count}")
    return table


def _whole(members: Collection[tarfile.TarInfo]) -> Span:
    last = max(members, key=lambda member: member.offset)
    stop = last.offset_data + -(-last.size // TAR_BLOCK) * TAR_BLOCK
    return Span(min(member.offset for member in members), stop)


def _tensors(
    path: Path, key: str, members: Mapping[str, tarfile.TarInfo], header: Mapping[str, Any], stored: dict[str, Span]
) -> Iterator[Span]:
    """Where a record's tensors are, in the order of TENSORS; those of its own are added to `stored`, by their hash."""
    for name, extension in TENSORS.items():
        digest = header.get(f"{name}_sha256")
        if (member := members.get(extension)) is not None and digest is not None:
            stored[digest] = Span(member.offset_data, member.offset_data + member.size)
        if digest is not None and digest not in stored:
            raise damaged(path, key, f"neither it nor a record before it has its {name} tensors")
        yield Span(0, 0) if digest is None else stored[digest]


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
                f"{path}: member {member.name!r} is refused: shards hold regular files KEY.json, KEY.safetensors, "
                "KEY.negative.safetensors, KEY.clip.safetensors, KEY.image.* and KEY.video.* only, and nothing is ever "
                "unpickled; build them again"
            )
        yield member


def _by_kind(path: Path, key: str, group: Iterable[tarfile.TarInfo]) -> dict[str, tarfile.TarInfo]:
    members: dict[str, tarfile.TarInfo] = {}
    for member in group:
        extension = member.name.split(".", 1)[1]
        kind = extension if extension in TENSORS.values() else extension.split(".")[0]
        if kind in members:
            raise damaged(path, key, f"it has two members of the kind {kind!r}")
        members[kind] = member
    if "json" not in members:
        raise damaged(path, key, "the file ends, or the next record begins, before its json")
    return members


def _key(member: tarfile.TarInfo) -> str:
    return member.name.split(".")[0]
