"""What does a build leave behind? Shards that appear complete or not at all, and the index that names them, last."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import webdataset
from torch import Tensor

from bpgo_video.atomic import atomic_file, write_json
from bpgo_video.data.prompt_records import (
    EncoderStamp,
    PromptRecord,
    ShardError,
    layout_of,
    plain_layout,
    tensor_bytes,
    to_layout,
    to_members,
)

FORMAT_VERSION = 2  # of 1 differs in what it may leave out: tensors that an earlier record of the shard has
READABLE = (1, 2)
NEGATIVE = "negative.safetensors"


def write_shard(path: Path, records: Iterable[PromptRecord], first: int, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Write one shard from a stream of records, one in memory at a time.

    Args:
        first: the number in the first record's key.
        layout: of every record's tensors, see `layout_of`.

    Returns:
        The shard's name, count and sha256, its "splits": prompts of each, and its "clip": the layout of their clips.

    Raises:
        ShardError: tensors that do not fit the layout, or clips of different layouts.
    """
    splits: Counter[str] = Counter()
    stored: set[str] = set()
    clip: dict[str, Any] | None = None
    with atomic_file(path) as aside:
        with aside.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
            for number, record in enumerate(records, first):
                owner = f"prompt {record.prompt!r}"
                for tensors in filter(None, (record.conditioning, record.negative)):
                    to_layout(tensors, layout, owner)
                clip = one_clip_layout(plain_layout(record.clip), clip, owner)
                tar.write({"__key__": f"{number:09d}", **to_members(record, stored)})
                splits[record.split] += 1
        digest = file_sha256(aside)
    count = sum(splits.values())
    return {"name": path.name, "count": count, "sha256": digest, "splits": dict(splits), "clip": clip}


def one_clip_layout(found: dict[str, Any], others: dict[str, Any] | None, owner: str) -> dict[str, Any]:
    """All clips of a folder are encoded alike: they are the samples of one batch."""
    if others not in (None, found):
        raise ShardError(f"{owner} has the clip tensors {found}, the others have {others}")
    return found


def write_negative(output: Path, conditioning: Mapping[str, Tensor]) -> None:
    """Store the conditioning of the negative prompt, without a batch axis."""
    with atomic_file(output / NEGATIVE) as aside:
        aside.write_bytes(tensor_bytes(conditioning))


def write_index(
    output: Path,
    shards: Sequence[Mapping[str, Any]],
    policy: EncoderStamp,
    negative_prompt: str = "",
    build: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Complete a folder of shards.

    Args:
        shards: what `write_shard` returned, in order; empty ones are left out.
        build: what the build depended on, for the index.
        more: what else the index says.

    Raises:
        ShardError: no shard has a record, or clips of different layouts.
    """
    splits: Counter[str] = Counter()
    clip: dict[str, Any] | None = None
    for shard in shards:
        splits.update(shard["splits"])
        if shard["count"]:
            clip = one_clip_layout(shard["clip"], clip, shard["name"])
    if not splits:
        raise ShardError(f"there are no prompts to write to {output}")
    negative = (output / NEGATIVE).read_bytes()
    index = {
        "format_version": FORMAT_VERSION,
        "count": sum(splits.values()),
        "splits": dict(splits),
        "policy": asdict(policy),
        "conditioning": layout_of(safetensors.torch.load(negative), policy.max_sequence_length),
        "negative_prompt": negative_prompt,
        "negative_sha256": hashlib.sha256(negative).hexdigest(),
        "shards": [{name: shard[name] for name in ("name", "count", "sha256")} for shard in shards if shard["count"]],
        **({"clip": clip} if clip else {}),
        **(more or {}),
        **({"build": dict(build)} if build else {}),
    }
    write_json(output / "index.json", index)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
