"""What is one prompt on disk? Two members of a tar file, `{key}.json` and `{key}.safetensors`; nothing is unpickled."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import pad
from webdataset.tariterators import group_by_keys, tar_file_expander

MEMBER = re.compile(r"(?P<key>[0-9A-Za-z-]+)\.(?P<kind>json|safetensors)")
TAR_BLOCK = 512


class ShardError(ValueError):
    """Prompt shards that are missing, incomplete, damaged or made for something else."""


@dataclass(frozen=True)
class PromptRecord:
    """A prompt and what the policy's transformer is conditioned on for it.

    Attributes:
        id: unique within a directory, from 0 to 2^63 - 1.
        conditioning: tensors without a batch axis; those with two axes are (tokens, dim).
    """

    id: int
    prompt: str
    split: str = "train"
    tags: tuple[str, ...] = ()
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)


class Place(NamedTuple):
    """Where a record lies: bytes [start, stop) of a shard."""

    shard: Path
    start: int
    stop: int


@dataclass
class ShardTable:
    """Every record of one shard, in machine integers: 32 bytes a prompt, whatever its embeddings weigh."""

    ids: array = field(default_factory=lambda: array("q"))
    splits: array = field(default_factory=lambda: array("q"))
    starts: array = field(default_factory=lambda: array("q"))
    stops: array = field(default_factory=lambda: array("q"))


@dataclass(frozen=True)
class EncoderStamp:
    """What made the embeddings: the policy folder's name, the fingerprint of its encoder, and its text length."""

    name: str
    fingerprint: str
    max_sequence_length: int


def layout_of(conditioning: Mapping[str, Tensor], max_sequence_length: int) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each tensor as the policy wants it: (tokens, dim) is padded to the policy's text length."""
    layout = {}
    for name, value in conditioning.items():
        shape = [max_sequence_length, value.shape[1]] if value.ndim == 2 else list(value.shape)
        layout[name] = {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
    return layout


def to_layout(conditioning: Mapping[str, Tensor], layout: Mapping[str, Any], owner: str) -> dict[str, Tensor]:
    """Zero-pad (tokens, dim) tensors to the policy's text length, as diffusers' Wan pipelines do."""
    if conditioning.keys() != layout.keys():
        raise ShardError(f"{owner} has the tensors {sorted(conditioning)}, the others {sorted(layout)}")
    padded = {}
    for name, value in conditioning.items():
        shape = torch.Size(layout[name]["shape"])
        if value.ndim == 2 and len(shape) == 2 and value.shape[0] < shape[0]:
            value = pad(value, (0, 0, 0, shape[0] - value.shape[0]))
        if value.shape != shape or str(value.dtype) != f"torch.{layout[name]['dtype']}":
            raise ShardError(
                f"{owner}: {name} is {value.dtype} {tuple(value.shape)}; it must be {layout[name]['dtype']} "
                f"{tuple(shape)}, (tokens, dim) with at most that many tokens"
            )
        padded[name] = value
    return padded


def to_members(record: PromptRecord) -> dict[str, bytes]:
    """The contents of a record's two tar members; the JSON carries the hash of the tensors."""
    tensors = tensor_bytes(record.conditioning)
    header = {
        "id": record.id,
        "prompt": record.prompt,
        "split": record.split,
        "tags": list(record.tags),
        "conditioning_sha256": hashlib.sha256(tensors).hexdigest(),
    }
    return {"json": json.dumps(header, ensure_ascii=False).encode(), "safetensors": tensors}


def tensor_bytes(conditioning: Mapping[str, Tensor]) -> bytes:
    """Safetensors without the zero rows that end a (tokens, dim) tensor; the reader puts them back."""
    return safetensors.torch.save({name: _trim(value.detach().cpu()) for name, value in conditioning.items()})


def _trim(value: Tensor) -> Tensor:
    if value.ndim == 2:
        used = value.ne(0).any(1).nonzero()
        value = value[: int(used[-1]) + 1 if len(used) else 1]
    return value.contiguous()


def read_record(place: Place) -> PromptRecord:
    """One record of a shard, checked against its hash.

    Raises:
        ShardError: it is damaged; the message names file and record.
    """
    with place.shard.open("rb") as stream:
        stream.seek(place.start)
        data = stream.read(place.stop - place.start)
    key = data[:100].split(b"\0")[0].decode(errors="replace").removesuffix(".json") or f"at byte {place.start}"
    try:
        files = tar_file_expander([{"url": str(place.shard), "stream": io.BytesIO(data)}])
        (members,) = group_by_keys(files)
        header = parse_header(members["json"])
        tensors = members["safetensors"]
    except (tarfile.TarError, ValueError, KeyError) as error:
        raise damaged(place.shard, key, str(error)) from error
    if hashlib.sha256(tensors).hexdigest() != header["conditioning_sha256"]:
        raise damaged(place.shard, key, "its tensors do not match their sha256")
    return PromptRecord(
        id=header["id"],
        prompt=header["prompt"],
        split=header["split"],
        tags=tuple(header["tags"]),
        conditioning=safetensors.torch.load(tensors),
    )


def parse_header(data: bytes) -> dict[str, Any]:
    """The JSON of a record. Raises ValueError where a field is missing or has another type."""
    header = json.loads(data)
    fields = {"id": int, "prompt": str, "split": str, "tags": list, "conditioning_sha256": str}
    if not isinstance(header, dict):
        raise ValueError("its JSON is not an object")
    for name, kind in fields.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"{name!r} of its JSON is {header.get(name)!r}, which is not of type {kind.__name__}")
    return header


def scan_shard(path: Path, count: int, split_codes: Mapping[str, int]) -> ShardTable:
    """Find every record of a tar file by its headers; of the contents only the JSON is read.

    Args:
        count: the number of records that it must hold.
        split_codes: the integer to write for each split.

    Raises:
        ShardError: the file is damaged or holds anything but pairs of JSON and safetensors.
    """
    table, key = ShardTable(), "(the first)"
    try:
        with tarfile.open(path, "r:") as tar:
            for first, second in _pairs(path, tar):
                key = _key(first)
                header = parse_header(cast(IO[bytes], tar.extractfile(first)).read())
                table.ids.append(header["id"])
                table.splits.append(split_codes[header["split"]])
                table.starts.append(first.offset)
                table.stops.append(second.offset_data + -(-second.size // TAR_BLOCK) * TAR_BLOCK)
    except KeyError as error:
        raise damaged(path, key, f"its split {error} is not in index.json") from error
    except (tarfile.TarError, json.JSONDecodeError, TypeError) as error:
        raise damaged(path, key, f"in or after it: {error}") from error
    if len(table.ids) != count:
        raise damaged(path, key, f"the last of {len(table.ids)} that can be read; the index states {count}")
    return table


def _pairs(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    first: tarfile.TarInfo | None = None
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
        match = MEMBER.fullmatch(member.name)
        if match is None or not member.isreg():
            raise ShardError(
                f"{path}: member {member.name!r} is refused: prompt shards hold regular files KEY.json and "
                f"KEY.safetensors only, and nothing is ever unpickled; build the shards again"
            )
        if first is None and match["kind"] == "json":
            first = member
        elif first is not None and member.name == f"{_key(first)}.safetensors":
            yield first, member
            first = None
        else:
            raise damaged(path, match["key"], "KEY.json must come first and KEY.safetensors next")
    if first is not None:
        raise damaged(path, _key(first), "the file ends before its tensors")


def _key(first: tarfile.TarInfo) -> str:
    return first.name.removesuffix(".json")


def damaged(path: Path, key: str, reason: str) -> ShardError:
    return ShardError(
        f"{path}: record {key}: {reason}. The file is damaged: copy it again, or build the directory again "
        f"with tools/make_prompt_shards.py"
    )
