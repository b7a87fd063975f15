"""Where do prompts come from? webdataset shards, read in an order that (seed, epoch) fixes and a position resumes.

    prompts-000000.tar ...   the records, see prompt_records.py; clips-000000.tar ... where they have clips
    negative.safetensors     the conditioning of the folder's negative prompt
    priors/<reward>.json     what estimate_priors.py adds, see prior_files.py
    skipped.jsonl            the prompts that the build left out, and why
    index.json               what all this is: counts, hashes, encoder, layout of the tensors; written last

Every rank reads the same stream. Nothing in a shard is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from bpgo_video.data.media import check_media
from bpgo_video.data.prior_files import PriorTable
from bpgo_video.data.prompt_records import (
    TENSORS,
    EncoderStamp,
    Place,
    PromptRecord,
    ShardError,
    Span,
    damaged,
    plain_layout,
    read_record,
    to_layout,
)
from bpgo_video.data.prompt_stream import PromptStream, Size
from bpgo_video.data.shard_scan import read_headers, scan_shard
from bpgo_video.data.shard_writing import READABLE, file_sha256, one_clip_layout
from bpgo_video.data.sources import Source, local_source
from bpgo_video.paths import SHARD_CACHE


class PromptShards:
    """Prompt shards, opened by one scan through the tar headers.

    Args:
        source: a folder, glob, brace range or URL, see sources.py.
        cache: where what is behind a URL is copied to.

    Attributes:
        directory: the folder on this machine; priors lie in it.
        splits: number of prompts of each split.
        policy: what made the embeddings.
        negative: conditioning of the negative prompt of all that have none of their own, without a batch axis.
        negative_prompt: its text.
        clip: shape and dtype of a clip's tensors by name; empty where the prompts have no clips.
        video: what clips were made of, where there are some: num_frames, height, width and fps, and the encoder's hash.

    Raises:
        ShardError: something is missing, damaged or of another format version; the message names file and record.
    """

    def __init__(self, source: Path | str, cache: Path | str = SHARD_CACHE) -> None:
        chosen = local_source(str(source), cache)
        self.directory = chosen.folder
        self.index = _read_index(self.directory)
        if chosen.names is not None:
            self.index = {**self.index, "shards": _chosen(self.index["shards"], chosen)}
        self.policy = EncoderStamp(**self.index["policy"])
        self.negative_prompt: str = self.index["negative_prompt"]
        self.negative = self._read_negative()
        self.clip: dict[str, Any] = self.index.get("clip", {})
        self.video: dict[str, Any] = self.index.get("video", {})
        self._shards = [self.directory / shard["name"] for shard in self.index["shards"]]
        self._scan()
        names = list(self.index["splits"])
        self.splits = {name: int((self._splits == code).sum()) for code, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._ids)

    def check_policy(self, policy: EncoderStamp) -> None:
        """Refuse embeddings of another encoder or text length; the folder's name does not matter.

        Raises:
            ShardError: they differ.
        """
        for name in ("fingerprint", "max_sequence_length"):
            ours, theirs = getattr(self.policy, name), getattr(policy, name)
            if ours != theirs:
                raise ShardError(
                    f"{self.directory} was made with {self.policy.name!r}, whose {name} is {ours}; the policy "
                    f"{policy.name!r} has {theirs}: build shards for it with bpgo-video prompts build"
                )

    def require_clips(self) -> None:
        """Refuse prompts without clips.

        Raises:
            ShardError: they have none.
        """
        if not self.clip:
            raise ShardError(
                f"{self.directory} holds prompts without video clips: build shards of videos with "
                "bpgo-video videos build"
            )

    def rows(self, split: str | None = None) -> np.ndarray:
        """Row numbers of the records of a split, or of all, in stored order."""
        if split is None:
            return np.arange(len(self))
        if not self.splits.get(split):
            raise ShardError(f"{self.directory} has no split {split!r}; it has {self.splits}")
        return np.flatnonzero(self._splits == list(self.splits).index(split))

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Ids of the prompts of these rows, without reading them."""
        return self._ids[rows]

    def has_images(self, split: str) -> bool:
        """Whether the prompts of a split have images: all, or none.

        Raises:
            ShardError: some have one and some have none.
        """
        rows = self.rows(split)
        count = int(self._images[rows].sum())
        if count not in (0, len(rows)):
            raise ShardError(
                f"{count} prompts of the split {split!r} of {self.directory} have an image, {len(rows) - count} have "
                f"none; give all of them one, or put them into two splits"
            )
        return count > 0

    def record(self, row: int) -> PromptRecord:
        """Record `row`, read from its shard and checked against its hash; embeddings padded to the policy's length.

        The negative prompt's conditioning is there for every record: its own, or the folder's.
        """
        place = self._place(row)
        record, layout = read_record(place), self.index["conditioning"]
        owner = f"{place.shard}: prompt {record.prompt!r}"
        negative = to_layout(record.negative, layout, owner) if record.negative else self.negative
        one_clip_layout(plain_layout(record.clip), self.clip, owner)
        return replace(record, conditioning=to_layout(record.conditioning, layout, owner), negative=negative)

    def records(self, split: str | None = None) -> Iterator[PromptRecord]:
        """The records of a split, or all, in stored order, one in memory at a time."""
        return (self.record(int(row)) for row in self.rows(split))

    def headers(self) -> Iterator[dict[str, Any]]:
        """What the records say of themselves, in stored order, without their tensors, images and videos."""
        return chain.from_iterable(map(read_headers, self._shards))

    def stream(
        self,
        split: str,
        seed: int,
        batch_size: int,
        start: int = 0,
        priors: Iterable[PriorTable] = (),
        size: Size | None = None,
    ) -> PromptStream:
        """An endless stream of batches that starts after `start` prompts were consumed; `size` as in `as_batch`."""
        return PromptStream(self, split, seed, batch_size, start, priors, size)

    def verify(self, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> None:
        """Read every record against its hashes, decode every image and video, compare every file with the index.

        Args:
            progress: wraps the iterable of rows, such as tqdm.

        Raises:
            ShardError, ImageError, VideoError: the first damage found.
        """
        for row in progress(self.rows()):
            record = self.record(int(row))
            check_media(record.media, f"{self._place(int(row)).shard}: prompt {record.prompt!r}")
        for path, shard in zip(self._shards, self.index["shards"], strict=True):
            if file_sha256(path) != shard["sha256"]:
                raise ShardError(f"{path}: its sha256 is not the index's: the file was changed; build it again")

    def _place(self, row: int) -> Place:
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        record, *tensors = starmap(Span, self._spans[row].tolist())
        found = zip(TENSORS, tensors, strict=True)
        return Place(self._shards[shard], record, {name: span for name, span in found if span.stop})

    def _read_negative(self) -> Mapping[str, Tensor]:
        path = self.directory / "negative.safetensors"
        if not path.is_file():
            raise ShardError(f"{path} is missing; build the directory again with bpgo-video prompts")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.index["negative_sha256"]:
            raise damaged(path, "(the negative prompt)", "it does not match the index's sha256")
        return to_layout(safetensors.torch.load(data), self.index["conditioning"], str(path))

    def _scan(self) -> None:
        codes = {name: code for code, name in enumerate(self.index["splits"])}
        counts = [shard["count"] for shard in self.index["shards"]]
        for path in self._shards:
            if not path.is_file():
                raise ShardError(f"{path} is missing, though {self.directory / 'index.json'} names it; copy it again")
        tables = [scan_shard(path, count, codes) for path, count in zip(self._shards, counts, strict=True)]
        join = {name: np.concatenate([getattr(t, name) for t in tables]) for name in vars(tables[0])}
        self._ids, self._splits, self._images = join["ids"], join["splits"], join["images"]
        self._spans = join["spans"].reshape(len(self._ids), -1, 2)
        self._first_rows = np.cumsum([0, *counts[:-1]])
        ids, occurrences = np.unique(self._ids, return_counts=True)
        if len(ids) < len(self._ids):
            raise ShardError(f"{self.directory}: id {ids[occurrences > 1][0]} is used by more than one prompt")


def _chosen(shards: list[dict[str, Any]], source: Source) -> list[dict[str, Any]]:
    unknown = set(source.names or ()) - {shard["name"] for shard in shards}
    if unknown:
        raise ShardError(f"{source.folder / 'index.json'} has no shard {', '.join(sorted(unknown))}")
    return [shard for shard in shards if shard["name"] in (source.names or ())]


def _read_index(directory: Path) -> dict[str, Any]:
    again = "with bpgo-video prompts build --input FILE --output DIR --policy FOLDER"
    path = directory / "index.json"
    if not directory.is_dir():
        raise ShardError(f"the prompt shards {directory} do not exist; make them {again}")
    if not path.is_file():
        raise ShardError(
            f"{path} is missing: no prompt shards are here, or their build did not finish; name the folder of a "
            f"finished build, or build {again}"
        )
    try:
        index = json.loads(path.read_text("utf-8"))
        version, count, shards = index["format_version"], index["count"], index["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged ({error!r}); copy it again, or build {again}") from error
    if version not in READABLE:
        raise ShardError(f"{path} has format version {version}, this program reads {READABLE}; build {again}")
    if not count or count != sum(shard["count"] for shard in shards):
        raise ShardError(f"{path} states {count} prompts in {len(shards)} shards that do not add up; build {again}")
    return index
