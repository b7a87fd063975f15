"""Prompt shards from ready-made records; shared by tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from bpgo_video.data.records import (
    NEGATIVE,
    EncoderStamp,
    PromptRecord,
    layout_of,
    write_index,
    write_shard,
    write_tensors,
)


def write_shards(
    records: Iterable[PromptRecord],
    output: Path,
    *,
    negative: Mapping[str, Tensor],
    policy: EncoderStamp,
    shard_size: int = 1000,
) -> None:
    records, shards = list(records), []
    write_tensors(output / NEGATIVE, negative)
    layout = layout_of(negative, policy.max_sequence_length)
    for number, first in enumerate(range(0, len(records), shard_size)):
        path = output / f"prompts-{number:06d}.tar"
        shards.append(write_shard(path, records[first : first + shard_size], first, layout))
    write_index(output, shards, policy)
