"""Prompt shards opened for random access: one scan of the tar headers, then any record by its row.

    prompts-000000.tar ...   the records, see records.py; clips-000000.tar ... for video clips
    negative.safetensors     the conditioning of the folder's negative prompt
    priors/<reward>.json     added by `bpgo-video priors`, see priors.py
    skipped.jsonl            the prompts that the build left out, and why
    index.json               counts, hashes, encoder and layout of the tensors; written last

Every rank reads the same records. Nothing in a shard is ever unpickled. Shards are in a local folder, or behind a URL,
from which each file is copied once and checked against its hash:

    runs/prompts                                             a local folder: all of its shards
    runs/prompts/prompts-00000[0-3].tar                      a glob: these shards of the folder
    runs/prompts/prompts-{000000..000003}.tar                a brace range
    https://host/prompts                                     a folder that holds index.json
    https://host/prompts/prompts-{000000..000003}.tar        these shards of it
    s3://bucket/prompts                                      through `aws s3 cp`
    pipe:ssh host cat prompts/prompts-{000000..000003}.tar   any command; other file names replace the shard's name

webdataset's gopen opens URLs; it also supports gs://, hf:// and others.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import safetensors.torch
import webdataset
from braceexpand import braceexpand
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from tqdm import tqdm

from bpgo_video.data.media import check_media
from bpgo_video.data.records import (
    KINDS,
    NEGATIVE,
    TENSORS,
    ByteRange,
    EncoderStamp,
    PromptRecord,
    ShardError,
    check_layout,
    damaged,
    differences,
    file_sha256,
    parse_header,
    read_record,
    to_layout,
)
from bpgo_video.documents import MalformedFile, check_seal, plain_json, wrong_value
from bpgo_video.files import SHARD_CACHE, atomic_file

REMOTE = re.compile(r"pipe:|[a-z0-9]+://")
SHARD = re.compile(r"(?:prompts|clips)-[^/\s]*\.tar")
SHARD_NAME = re.compile(r"(?:prompts|clips)-[\w.-]*\.tar")  # in an index; it becomes a part of URLs and commands
READABLE = (1, 2)  # format versions
INNERMOST = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
COUNTED_TAGS = 10_000  # of a split
MAX_SHARDS = 100_000  # that a pattern may name
KEY = re.compile(r"[0-9A-Za-z-]+")
TAR_BLOCK = 512
ROW = np.dtype(  # of a record; `ranges` are those of the record, its conditioning and its own negative conditioning
    [
        ("id", np.int64),
        ("split", np.int32),
        ("shard", np.int32),
        ("image", np.bool_),
        ("video", np.bool_),
        ("ranges", np.int64, (3, 2)),
    ]
)
STAMPED = {  # entry of the index -> what differs if it does, and the command that makes it
    "images": ("texts that were encoded with other images", "bpgo-video prompts build --height H --width W"),
    "video": ("clips of another video or VAE", "bpgo-video videos build"),
}
BUILD = "with bpgo-video prompts build --input FILE --output DIR --policy FOLDER"


class PromptShards:
    """A folder of prompt shards. Holds 66 bytes per prompt, whatever the size of its embeddings.

    Args:
        source: a folder, glob, brace range or URL, see above.
        cache: folder for copies of remote shards.

    Attributes:
        directory: the folder on this machine; it also holds the priors.
        index: the content of index.json, with the selected shards.
        splits: number of prompts by split.
        policy: what made the embeddings.
        negative_prompt: for all prompts without their own.
        negative: its conditioning, without a batch axis.
        clip: layout of a clip's tensors by name; empty if the prompts have no clips.
        video: num_frames, height, width, fps and the hash of the encoder of clips; empty without clips.

    Raises:
        ShardError: something is missing, damaged or of an unknown format version; the message names file and record.
    """

    def __init__(self, source: Path | str, cache: Path | str = SHARD_CACHE) -> None:
        self.directory, selected = local_shards(str(source), Path(cache))
        path = self.directory / "index.json"
        if not self.directory.is_dir():
            raise ShardError(f"the prompt shards {self.directory} do not exist; make them {BUILD}")
        if not path.is_file():
            raise ShardError(
                f"{path} is missing: the folder holds no prompt shards, or their build did not finish; name the folder "
                f"of a finished build, or build {BUILD}"
            )
        self.index = _parse_index(path.read_bytes(), path, selected)
        self.policy = EncoderStamp(**self.index["policy"])
        self.negative_prompt: str = self.index["negative_prompt"]
        self.negative = self._read_negative()
        self.clip: dict[str, Any] = self.index.get("clip", {})
        self.video: dict[str, Any] = self.index.get("video", {})
        self._paths = [self.directory / shard["name"] for shard in self.index["shards"]]
        for path in self._paths:
            if not path.is_file():
                raise ShardError(f"{path} is missing, though {self.directory / 'index.json'} names it; copy it again")
        self._tags: dict[str, Counter[str]] = {split: Counter() for split in self.index["splits"]}
        self._rows = np.fromiter(self._scan(), dtype=ROW)
        ids, uses = np.unique(self._rows["id"], return_counts=True)
        if len(ids) < len(self):
            raise ShardError(f"{self.directory}: several prompts have the id {ids[uses > 1][0]}; build {BUILD}")
        names = self.index["splits"]
        self.splits = {name: int((self._rows["split"] == code).sum()) for code, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._rows)

    def check_policy(self, policy: EncoderStamp) -> None:
        """Raise ShardError if another encoder or text length made the embeddings. The folder's name may differ."""
        expected = {name: getattr(policy, name) for name in ("fingerprint", "max_sequence_length")}
        if changes := differences(vars(self.policy), expected):
            raise ShardError(
                f"{self.directory} was made with {self.policy.name!r} ({changes}): build shards for {policy.name!r} "
                f"{BUILD}"
            )

    def check_stamp(self, stamp: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise ShardError, naming what differs, if a stamp of images or clips is not the index's."""
        for kind, expected in stamp.items():
            if changes := differences(self.index.get(kind, {}), expected):
                what, command = STAMPED[kind]
                raise ShardError(
                    f"{self.directory} holds {what} ({changes}): set the recipe's `video`, or build shards for it with "
                    f"{command}"
                )

    def require_clips(self) -> None:
        """Raise ShardError if the prompts have no clips."""
        if not self.clip:
            raise ShardError(
                f"{self.directory} holds prompts without video clips: build shards of videos with "
                "bpgo-video videos build"
            )

    def rows(self, split: str | None = None) -> np.ndarray:
        """Row numbers of a split's records, or of all, in stored order. Raises ShardError if the split has none."""
        if split is None:
            return np.arange(len(self))
        if not self.splits.get(split):
            kind = "videos" if self.clip else "prompts"
            raise ShardError(
                f"{self.directory} has no split {split!r}; it has {self.splits}. Name one of these in the recipe "
                f"(evaluation.split, data.split), or hold some out: bpgo-video {kind} build --input FILE "
                f"--output {self.directory} --policy FOLDER --holdout 0.1 --overwrite"
            )
        return np.flatnonzero(self._rows["split"] == list(self.splits).index(split))

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """The prompts' ids, [rows] int64, without reading the records."""
        return self._rows["id"][rows]

    def common_tags(self, split: str, most: int) -> list[str]:
        """The tags that most prompts of a split have, among the first COUNTED_TAGS different ones, by number."""
        return [tag for tag, _ in sorted(self._tags[split].items(), key=lambda item: (-item[1], item[0]))[:most]]

    def has_images(self, split: str) -> bool:
        """Whether the prompts of a split have images. Raises ShardError if only some have."""
        return self._all_have("image", split)

    def has_videos(self, split: str) -> bool:
        """Whether the prompts of a split have videos. Raises ShardError if only some have."""
        return self._all_have("video", split)

    def _all_have(self, kind: str, split: str) -> bool:
        rows = self.rows(split)
        count = int(self._rows[kind][rows].sum())
        if count not in (0, len(rows)):
            article = "an" if kind == "image" else "a"
            raise ShardError(
                f"{count} prompts of the split {split!r} of {self.directory} have {article} {kind}, "
                f"{len(rows) - count} have none; give all of them one, or put them into two splits"
            )
        return count > 0

    def record(self, row: int) -> PromptRecord:
        """Record `row`, checked against its hashes. Its conditioning is padded to the policy's text length.

        `negative` is always filled: with the prompt's own or the folder's conditioning.
        """
        entry = self._rows[row]
        path = self._paths[entry["shard"]]
        whole, *tensors = (ByteRange(int(start), int(stop)) for start, stop in entry["ranges"])
        ranges = {kind: tensor for kind, tensor in zip(TENSORS, tensors, strict=True) if tensor.stop}
        record = read_record(path, whole, ranges)
        layout, owner = self.index["conditioning"], f"{path}: prompt {record.prompt!r}"
        check_layout(record.clip, self.clip, owner)
        negative = to_layout(record.negative, layout, owner) if record.negative else self.negative
        return replace(record, conditioning=to_layout(record.conditioning, layout, owner), negative=negative)

    def records(self, split: str | None = None) -> Iterator[PromptRecord]:
        """The records of a split, or all, in stored order, one in memory at a time."""
        return (self.record(int(row)) for row in self.rows(split))

    def headers(self) -> Iterator[dict[str, Any]]:
        """The JSON of every record in stored order; tensors, images and videos are not read."""
        return (header for path in self._paths for _, _, header in _read_headers(path))

    def verify(self, show_progress: bool = False) -> None:
        """Check every record against its hashes, decode every image and video, compare every file with the index.

        Raises:
            ShardError, ImageError, VideoError: the first damage found.
        """
        for row in tqdm(self.rows(), desc="records", unit="record", disable=not show_progress):
            record, path = self.record(int(row)), self._paths[self._rows["shard"][row]]
            for kind, media in record.media.items():
                check_media(kind, media.data, f"{path}: prompt {record.prompt!r}")
        for path, shard in zip(self._paths, self.index["shards"], strict=True):
            if file_sha256(path) != shard["sha256"]:
                raise ShardError(f"{path}: its sha256 differs from the index's: the file was changed; build it again")

    def _read_negative(self) -> Mapping[str, Tensor]:
        path = self.directory / NEGATIVE
        if not path.is_file():
            raise ShardError(f"{path} is missing; build the folder again {BUILD}")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.index["negative_sha256"]:
            raise damaged(path, "(the negative prompt)", "it does not match the index's sha256")
        return to_layout(safetensors.torch.load(data), self.index["conditioning"], str(path))

    def _scan(self) -> Iterator[tuple[int, int, int, bool, bool, list[ByteRange]]]:
        """Every record as a ROW."""
        splits = {name: code for code, name in enumerate(self.index["splits"])}
        for number, (path, shard) in enumerate(zip(self._paths, self.index["shards"], strict=True)):
            count, key, stored = 0, "(the first)", dict[str | None, ByteRange]({None: ByteRange(0, 0)})
            for key, members, header in _read_headers(path):
                if header["split"] not in splits:
                    raise damaged(path, key, f"its split {header['split']!r} is not in index.json")
                last = max(members.values(), key=lambda member: member.offset)
                stop = last.offset_data + -(-last.size // TAR_BLOCK) * TAR_BLOCK
                ranges = [ByteRange(min(member.offset for member in members.values()), stop)]
                for kind in TENSORS:
                    member, digest = members.get(kind), header.get(f"{kind}_sha256")
                    if member and digest:
                        stored[digest] = ByteRange(member.offset_data, member.offset_data + member.size)
                    if digest not in stored:
                        raise damaged(path, key, f"neither it nor an earlier record has its {kind} tensors")
                    ranges.append(stored[digest])
                tags = self._tags[header["split"]]
                tags.update(tag for tag in header["tags"] if tag in tags or len(tags) < COUNTED_TAGS)
                yield (
                    header["id"],
                    splits[header["split"]],
                    number,
                    *(kind in members for kind in ("image", "video")),
                    ranges,
                )
                count += 1
            if count != shard["count"]:
                raise damaged(path, key, f"the last of {count} that can be read; the index states {shard['count']}")


def _read_headers(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], dict[str, Any]]]:
    """Key, members by kind, and JSON of every record of a shard."""
    key = "(the first)"
    try:
        with tarfile.open(path, "r:") as tar:
            for key, group in groupby(_members(path, tar), key=lambda member: member.name.split(".")[0]):
                members: dict[str, tarfile.TarInfo] = {}
                for member in group:
                    kind = KINDS[member.name.split(".", 1)[1]]
                    if kind in members:
                        raise damaged(path, key, f"it has two members of the kind {kind!r}")
                    members[kind] = member
                if "json" not in members:
                    raise damaged(path, key, "the file ends, or the next record begins, before its json")
                yield key, members, parse_header(cast(IO[bytes], tar.extractfile(members["json"])).read())
    except ShardError:
        raise
    except (tarfile.TarError, ValueError, TypeError) as error:
        raise damaged(path, key, f"in or after it: {error}") from error


def _members(path: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
        key, _, extension = member.name.partition(".")
        if not KEY.fullmatch(key) or extension not in KINDS or not member.isreg():
            raise ShardError(
                f"{path}: member {member.name!r} is refused: shards hold only regular files named KEY with one of the "
                f"extensions {', '.join(KINDS)}, and nothing is ever unpickled; build them again"
            )
        yield member


def local_shards(source: str, cache: Path) -> tuple[Path, list[str]]:
    """Copy remote shards to this machine unless they are here already.

    Args:
        cache: folder for copies. A copy is named after the hash of its index, so a changed original gets a new copy.
            Ranks that share a cache take turns; the first one copies.

    Returns:
        The local folder, and the names of the selected shards; none selects all.

    Raises:
        ShardError: a pattern matches nothing, a URL cannot be read, a file does not match its hash, or the cache cannot
            be written.
    """
    path = Path(source)
    if not REMOTE.match(source) and (os.path.isdir(path) or not SHARD.fullmatch(path.name)):
        return path, []
    names = _expanded(source)
    if REMOTE.match(source):
        return _copy_missing(source, names, cache)
    missing = [name for name in names if not glob(name)]
    found = sorted({Path(match) for name in names for match in glob(name)})
    if missing or len({shard.parent for shard in found}) != 1:
        raise ShardError(f"{source} must name shards of one folder; nothing is at {', '.join(missing) or source}")
    return found[0].parent, [shard.name for shard in found]


def _expanded(source: str) -> list[str]:
    """The names that braces stand for. Raises ShardError if they do not match, or stand for very many."""
    count, rest = 1, source
    while count <= MAX_SHARDS and (group := INNERMOST.search(rest)):
        count *= _alternatives(group[1])
        rest = rest[: group.start()] + rest[group.end() :]
    if count > MAX_SHARDS:
        raise ShardError(f"{source[:200]} stands for more than {MAX_SHARDS:,} shards; name fewer of them")
    try:
        return list(braceexpand(source))
    except ValueError as error:
        raise ShardError(f"{source}: the braces do not match") from error


def _alternatives(text: str) -> int:
    """How many names a pair of braces stands for, or more."""
    if not (numbers := RANGE.fullmatch(text)):
        return text.count(",") + 1
    first, last, step = (float(number or 1) for number in numbers.groups())
    return int(min(abs(last - first) / max(1.0, abs(step)), MAX_SHARDS)) + 1


def _copy_missing(source: str, urls: list[str], cache: Path) -> tuple[Path, list[str]]:
    selected = [match[0] for url in urls if (match := SHARD.search(url))]
    if selected and len(selected) != len(urls):
        raise ShardError(f"{source} must name one folder, or shards (prompts-*.tar, clips-*.tar) of one")
    if "*" in source and not source.startswith("pipe:"):
        raise ShardError(f"{source}: a URL cannot be searched; name a folder, or a range such as {{000000..000009}}")
    index_url = _url(urls[0], "index.json")
    with _opened(index_url) as stream:
        data = stream.read()
    index = _parse_index(data, index_url, selected)
    hashes = {shard["name"]: shard["sha256"] for shard in index["shards"]} | {NEGATIVE: index["negative_sha256"]}
    try:
        folder = cache.expanduser() / hashlib.sha256(data).hexdigest()[:16]  # RuntimeError: no home folder is known
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except (OSError, RuntimeError) as error:
        raise ShardError(f"data.cache {cache} cannot hold copies of shards ({error}); name another folder") from error
    with FileLock(folder / ".lock"):
        missing = [name for name in hashes if not (folder / name).is_file()]
        for name in tqdm(missing, desc="Copying shards", unit="file", disable=None):  # None: no bar in a log file
            url = _url(urls[0], name)
            with atomic_file(folder / name) as aside:
                with _opened(url) as stream, aside.open("wb") as copy:
                    shutil.copyfileobj(stream, copy, 2**20)
                if (found := file_sha256(aside)) != hashes[name]:
                    raise ShardError(
                        f"{url} has the sha256 {found}, the index states {hashes[name]}: one is damaged or outdated"
                    )
        if not (folder / "index.json").is_file():
            with atomic_file(folder / "index.json") as aside:
                aside.write_bytes(data)
    return folder, selected


def _url(shard_or_folder: str, name: str) -> str:
    """The URL of a file next to a shard, or in a folder."""
    if SHARD.search(shard_or_folder):
        return SHARD.sub(name, shard_or_folder)
    return f"{shard_or_folder.rstrip('/')}/{name}"


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    try:
        with webdataset.gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url) as stream:
            yield stream
    except (OSError, ValueError) as error:
        raise ShardError(f"{url} cannot be read: {error}") from error


class _Form(BaseModel):
    model_config = ConfigDict(strict=True)


class _Shard(_Form):
    name: str
    count: int
    sha256: str


class _Tensor(_Form):
    shape: list[int]
    dtype: str


class _Policy(_Form):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: str
    fingerprint: str
    max_sequence_length: int


class _Index(_Form):
    format_version: int
    count: int
    splits: dict[str, int]
    policy: _Policy
    conditioning: dict[str, _Tensor]
    negative_prompt: str
    negative_sha256: str
    shards: list[_Shard]
    clip: dict[str, _Tensor] = {}
    video: dict[str, Any] = {}
    images: dict[str, Any] = {}
    build: dict[str, Any] = {}


def _parse_index(data: bytes, where: Path | str, selected: Sequence[str]) -> dict[str, Any]:
    """The content of an index.json, restricted to the selected shards if there are any."""
    try:
        index = plain_json(data, where)
        _Index.model_validate(index)
    except (MalformedFile, ValidationError) as error:
        raise ShardError(
            f"{where} is not an index of prompt shards, or damaged ({wrong_value(error)}); copy it again"
        ) from error
    version, count = index["format_version"], index["count"]
    shards = {shard["name"]: shard for shard in index["shards"]}
    total = sum(shard["count"] for shard in shards.values())
    if version not in READABLE:
        raise ShardError(f"{where} has format version {version}, this program reads {READABLE}; build {BUILD}")
    if not count or count != total:
        raise ShardError(f"{where} states {count} prompts, but {total} in {len(shards)} shards; build {BUILD}")
    if unknown := [name for name in (*selected, *shards) if name not in shards or not SHARD_NAME.fullmatch(name)]:
        raise ShardError(f"{where} has no shard {', '.join(unknown)}; it has {', '.join(shards)}")
    try:
        check_seal(index, where)
    except MalformedFile as error:
        raise ShardError(f"{error}; copy it again, or build {BUILD}") from None
    return index | {"shards": [shard for name, shard in shards.items() if name in selected or not selected]}
