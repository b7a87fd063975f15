"""Building a folder of shards: encoded shard by shard on any number of ranks, resumable, completed by its index.

While a build is unfinished, its folder holds `.unfinished/`: what the build depends on (identity.json), a note for each
finished shard, and the conditioning of repeated texts. The same command continues after the last whole shard. Rank r of
n writes the shards r, r + n, ...; ranks share nothing but the folder, and the one that finds all shards finished writes
index.json.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import safetensors.torch
import webdataset
from more_itertools import chunked
from torch import Tensor
from tqdm import tqdm

from bpgo_video.data.fingerprint import EncoderStamp
from bpgo_video.data.media import ImageError, VideoError, read_media
from bpgo_video.data.prompt_files import Line, Plan, PromptFileError, Rejected, make_plan, prompt_id
from bpgo_video.data.records import (
    PromptRecord,
    ShardError,
    check_layout,
    layout_of,
    tensor_bytes,
    to_layout,
    to_members,
    without_batch,
)
from bpgo_video.files import atomic_file, write_json

FORMAT_VERSION = 2  # 1 has no conditioning that refers to an earlier record of the shard
NEGATIVE = "negative.safetensors"
UNFINISHED = ".unfinished"
SKIPPED = "skipped.jsonl"

Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]  # texts -> tensors; axis 0 is the text


def with_media(line: Line) -> PromptRecord:
    """A prompt with the bytes of its image and video. Raises ImageError or VideoError if one does not decode."""
    return replace(line.record, media={kind: read_media(kind, path) for kind, path in line.media.items()})


@dataclass(frozen=True)
class Content:
    """What the records of a build hold besides the embeddings of their texts.

    Attributes:
        name: of the shard files and their content.
        complete: makes the record of a line from its files, with conditioning if that depends on more than the text.
            Its ImageError or VideoError rejects the line.
        stamp: entries of the index that describe this content; a build continues only with an equal stamp.
    """

    name: str = "prompts"
    complete: Callable[[Line], PromptRecord] = with_media
    stamp: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """The build of one folder, on one rank.

    Attributes:
        encode: the policy's text encoder, called only if something is left to encode.
        policy: identifies that encoder.
        negative_prompt: for prompts without their own.
        shard_size: prompts per shard.
        batch_size: prompts encoded together.
        dtype: of the embeddings, torch's name.
    """

    plan: Plan
    output: Path
    encode: Encode
    policy: EncoderStamp
    negative_prompt: str = ""
    shard_size: int = 1000
    batch_size: int = 32
    dtype: str = "float32"
    content: Content = Content()

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the bytes of the folder depend on."""
        return {
            "prompts": self.plan.digest,
            "count": self.plan.count,
            "encoder": self.policy.fingerprint,
            "max_sequence_length": self.policy.max_sequence_length,
            **{name: getattr(self, name) for name in ("negative_prompt", "shard_size", "batch_size", "dtype")},
            **self.content.stamp,
        }

    def run(self, rank: int = 0, world_size: int = 1, show_progress: bool = False) -> bool:
        """Write this rank's missing shards.

        Returns:
            Whether the folder is complete now.

        Raises:
            FileExistsError: the folder holds something else, or shards of other prompts or settings, which are named.
            PromptFileError: an image or video does not decode, and the plan's `on_error` is "stop".
        """
        self._open()
        if (self.output / "index.json").is_file():
            self._clean()
            return True
        size = self.shard_size
        missing = [n for n in range(rank, self._num_shards, world_size) if not self._note(n).is_file()]
        total = sum(min(size, self.plan.count - number * size) for number in missing)
        lines = self._lines_of(frozenset(missing)) if missing else ()
        bar = tqdm(lines, total=total, desc=self.content.name, disable=not show_progress)
        for number, group in groupby(bar, key=lambda item: item[0]):
            rejected: list[Rejected] = []
            records = self._records((line for _, line in group), rejected)
            path = self.output / f"{self.content.name}-{number:06d}.tar"
            shard = write_shard(path, records, number * size, self._layout())
            write_json(self._note(number), {**shard, "rejected": rejected})
        return self._finish()

    @property
    def _num_shards(self) -> int:
        return -(-self.plan.count // self.shard_size)

    def _note(self, number: int) -> Path:
        return self.output / UNFINISHED / f"{number:06d}.json"

    def _open(self) -> None:
        """Start the build, or check that the folder holds the same one."""
        present = {path.name for path in self.output.iterdir()} if self.output.exists() else set()
        if present and not present & {UNFINISHED, "index.json"}:
            raise FileExistsError(f"{self.output} exists and is not empty; name another output, or delete it first")
        identity = self.output / UNFINISHED / "identity.json"
        if "index.json" in present:
            found = json.loads((self.output / "index.json").read_text("utf-8")).get("build", {})
        elif identity.is_file():
            found = json.loads(identity.read_text("utf-8"))
        else:
            write_json(identity, self.identity)
            return
        items = self.identity.items()
        changes = [f"{name} {found.get(name)!r}, now {value!r}" for name, value in items if found.get(name) != value]
        if changes:
            raise FileExistsError(
                f"{self.output} was built from other prompts or settings ({'; '.join(changes)}); name another output, "
                "or delete it first"
            )

    def _lines_of(self, shards: frozenset[int]) -> Iterator[tuple[int, Line]]:
        usable = (line for line in self.plan.lines() if isinstance(line, Line))
        for row, line in enumerate(usable):
            if (number := row // self.shard_size) in shards:
                yield number, line

    def _records(self, lines: Iterable[Line], rejected: list[Rejected]) -> Iterator[PromptRecord]:
        """The complete records of the lines; lines whose media do not decode go to `rejected`."""
        for batch in chunked(lines, self.batch_size):
            records = [record for line in batch if (record := self._complete(line, rejected))]
            conditioning = iter(self._encode_texts([r.prompt for r in records if not r.conditioning]))
            own = {text for r in records if (text := r.negative_prompt) is not None} - {self.negative_prompt}
            texts = sorted(own)
            negatives: dict[str | None, dict[str, Tensor]] = dict(zip(texts, self._encode_texts(texts), strict=True))
            for record in records:
                negative = negatives.get(record.negative_prompt, {})
                yield replace(record, conditioning=record.conditioning or next(conditioning), negative=negative)

    def _complete(self, line: Line, rejected: list[Rejected]) -> PromptRecord | None:
        try:
            return self.content.complete(line)
        except (ImageError, VideoError) as error:  # not OSError: a failing disk must end the build
            if self.plan.on_error == "stop":
                raise PromptFileError(f"{line.place}: {error}") from error
            rejected.append(Rejected(line.place, str(error)))
            return None

    def _encode_texts(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """The conditioning of each text, without a batch axis.

        A text that several prompts share is encoded alone and kept in a file for all ranks until the build ends. Its
        bits therefore depend neither on the batch in which it appears first nor on interruptions.
        """
        kept = {text: self._encode_repeated(text) for text in texts if prompt_id(text) in self.plan.repeated}
        others = [text for text in texts if text not in kept]
        batch = self.encode(others) if others else {}
        rows = (without_batch(batch, row) for row in range(len(others)))
        return [kept[text] if text in kept else next(rows) for text in texts]

    def _encode_repeated(self, text: str) -> dict[str, Tensor]:
        name = f"{prompt_id(text):016x}"
        path = self.output / UNFINISHED / "texts" / name[:2] / f"{name}.safetensors"  # at most 256 files per folder
        if not path.is_file():
            _write_tensors(path, without_batch(self.encode([text])))
        return safetensors.torch.load(path.read_bytes())

    def _layout(self) -> dict[str, Any]:
        if not (self.output / NEGATIVE).is_file():
            write_negative(self.output, without_batch(self.encode([self.negative_prompt])))
        negative = safetensors.torch.load((self.output / NEGATIVE).read_bytes())
        return layout_of(negative, self.policy.max_sequence_length)

    def _finish(self) -> bool:
        try:
            notes = [json.loads(self._note(number).read_text("utf-8")) for number in range(self._num_shards)]
        except FileNotFoundError:  # another rank still writes shards, or has just finished the folder
            return (self.output / "index.json").is_file()
        for note in notes:
            if not note["count"]:  # all of its prompts were skipped
                (self.output / note["name"]).unlink(missing_ok=True)
        undecodable = [Rejected(*fields) for note in notes for fields in note["rejected"]]
        skipped = self.plan.rejected + len(undecodable)
        if skipped:
            unusable = (line for line in self.plan.lines() if isinstance(line, Rejected))
            with atomic_file(self.output / SKIPPED) as aside, aside.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line._asdict()) + "\n" for line in chain(unusable, undecodable))
        build = {**self.identity, "skipped": skipped}
        write_index(self.output, notes, self.policy, self.negative_prompt, build, self.content.stamp)
        self._clean()
        return True

    def _clean(self) -> None:
        for path in self.output.glob(f".{self.content.name}-*.partial-*"):  # of builds that were killed
            path.unlink(missing_ok=True)
        shutil.rmtree(self.output / UNFINISHED, ignore_errors=True)  # ranks may delete it at the same time


def build_shards(
    inputs: Iterable[Path | str], output: Path | str, encode: Encode, policy: EncoderStamp, **settings: Any
) -> None:
    """Build shards of prompt files on this process alone; `settings` are those of Build."""
    Build(make_plan(inputs), Path(output), encode, policy, **settings).run()


def write_shard(path: Path, records: Iterable[PromptRecord], first: int, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Write one shard from a stream of records, one in memory at a time.

    Args:
        first: the number in the first record's key.
        layout: of every record's conditioning, see `layout_of`.

    Returns:
        The shard's name, count and sha256, the prompts of each split ("splits"), and the layout of its clips ("clip").

    Raises:
        ShardError: tensors do not fit the layout, or clips have different layouts.
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
                clip = layout_of(record.clip) if clip is None else clip
                check_layout(record.clip, clip, owner)
                tar.write({"__key__": f"{number:09d}", **to_members(record, stored)})
                splits[record.split] += 1
        digest = file_sha256(aside)
    count = sum(splits.values())
    return {"name": path.name, "count": count, "sha256": digest, "splits": dict(splits), "clip": clip}


def write_negative(output: Path, conditioning: Mapping[str, Tensor]) -> None:
    """Store the conditioning of the folder's negative prompt, given without a batch axis."""
    _write_tensors(output / NEGATIVE, conditioning)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic_file(path) as aside:
        aside.write_bytes(tensor_bytes(tensors))


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
        shards: what `write_shard` returned, in order; empty shards are left out.
        build: what the build depended on.
        more: further entries of the index.

    Raises:
        ShardError: no shard has a record, or clips have different layouts.
    """
    shards = [shard for shard in shards if shard["count"]]
    if not shards:
        raise ShardError(f"there are no prompts to write to {output}")
    splits: Counter[str] = Counter()
    clip = shards[0]["clip"]
    for shard in shards:
        splits.update(shard["splits"])
        if shard["clip"] != clip:
            raise ShardError(f"{shard['name']} has clips of {shard['clip']}, {shards[0]['name']} of {clip}")
    negative = (output / NEGATIVE).read_bytes()
    index = {
        "format_version": FORMAT_VERSION,
        "count": sum(splits.values()),
        "splits": dict(splits),
        "policy": asdict(policy),
        "conditioning": layout_of(safetensors.torch.load(negative), policy.max_sequence_length),
        "negative_prompt": negative_prompt,
        "negative_sha256": hashlib.sha256(negative).hexdigest(),
        "shards": [{name: shard[name] for name in ("name", "count", "sha256")} for shard in shards],
        **({"clip": clip} if clip else {}),
        **(more or {}),
        **({"build": dict(build)} if build else {}),
    }
    write_json(output / "index.json", index)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
