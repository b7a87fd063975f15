"""How do prompts become shards? Planned in one pass, then encoded shard by shard, by any number of ranks.

While a build is unfinished, its folder holds `.unfinished/`: what it depends on (identity.json), a note for every shard
that is done, and the conditioning of repeated texts. The same command goes on where it stopped, at the last whole
shard. Rank r of n writes the shards r, r + n, ...; the ranks meet in the folder alone, and the one that finds all
shards done writes the index.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from bpgo_video.atomic import atomic_file, write_json
from bpgo_video.data.images import ImageError
from bpgo_video.data.media import read_media
from bpgo_video.data.once import Encode, EncodeOnce
from bpgo_video.data.prompt_files import Line, PromptFileError, Rejected
from bpgo_video.data.prompt_plan import Plan, Progress, make_plan, without_bar
from bpgo_video.data.prompt_records import EncoderStamp, PromptRecord, layout_of
from bpgo_video.data.shard_writing import NEGATIVE, write_index, write_negative, write_shard
from bpgo_video.data.video import VideoError

UNFINISHED = ".unfinished"
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class BuildSettings:
    """What the bytes of a folder depend on besides prompts and encoder.

    Attributes:
        negative_prompt: of the prompts that have none of their own.
        shard_size: prompts in a shard.
        batch_size: prompts encoded at once.
        dtype: of the embeddings, by torch's name.
    """

    negative_prompt: str = ""
    shard_size: int = 1000
    batch_size: int = 32
    dtype: str = "float32"


def with_media(line: Line) -> PromptRecord:
    """A prompt with the bytes of its image and video. Raises ImageError or VideoError where one does not decode."""
    return replace(line.record, media={kind: read_media(kind, path) for kind, path in line.media.items()})


@dataclass(frozen=True)
class Content:
    """What the records of a build hold beside their texts' embeddings.

    Attributes:
        name: of the shards, and of what they hold.
        complete: adds to a line's record what its files become, and its conditioning where that is not of its text
            alone; its ImageError or VideoError rejects the line.
        stamp: what the index says of it; a build of another is refused.
    """

    name: str = "prompts"
    complete: Callable[[Line], PromptRecord] = with_media
    stamp: Mapping[str, Any] = field(default_factory=dict)


def build_shards(
    inputs: Iterable[Path | str],
    output: Path | str,
    encode: Encode,
    policy: EncoderStamp,
    *,
    split: str = "train",
    on_error: str = "stop",
    **settings: Any,
) -> None:
    """Plan and build on this process alone; `settings` as in BuildSettings."""
    plan = make_plan(list(inputs), split, on_error=on_error)
    Build(plan, Path(output), encode, policy, BuildSettings(**settings)).run()


class Build:
    """The build of one folder, on one rank.

    Args:
        encode: the policy's text encoder; not called where nothing is left to encode.
        policy: what it is.
        content: what else a record holds.

    Raises:
        FileExistsError: the folder holds something else, or shards of other prompts or settings; what differs is named.
    """

    def __init__(
        self,
        plan: Plan,
        output: Path,
        encode: Encode,
        policy: EncoderStamp,
        settings: BuildSettings,
        content: Content = Content(),
    ) -> None:
        self.plan, self.output, self.policy, self.settings, self.content = plan, output, policy, settings, content
        self.num_shards = -(-plan.count // settings.shard_size)
        self._notes = output / UNFINISHED
        self._encode = encode
        self._encode_once = EncodeOnce(encode, self._notes / "texts", plan.is_repeated)
        self.identity = {
            "prompts": plan.digest,
            "count": plan.count,
            "encoder": policy.fingerprint,
            "max_sequence_length": policy.max_sequence_length,
            **asdict(settings),
            **content.stamp,
        }
        self._open()

    def run(self, rank: int = 0, world_size: int = 1, progress: Progress = without_bar) -> bool:
        """Write what is missing of this rank's shards; whether the folder is now complete.

        Raises:
            PromptFileError: an image or video that does not decode, and `on_error` is "stop".
        """
        if (self.output / "index.json").is_file():
            self._clean()
            return True
        todo = {n for n in range(rank, self.num_shards, world_size) if not self._note(n).is_file()}
        size = self.settings.shard_size
        total = sum(min(size, self.plan.count - number * size) for number in todo)
        lines = progress(self._numbered(todo), total=total, desc=self.content.name)
        for number, group in groupby(lines, key=lambda item: item[0]):
            self._write(number, (line for _, line in group))
        return self._finish()

    def _open(self) -> None:
        present = {path.name for path in self.output.iterdir()} if self.output.exists() else set()
        if present and not present & {UNFINISHED, "index.json"}:
            raise FileExistsError(f"{self.output} exists and is not empty; name another output, or delete it first")
        identity = self._notes / "identity.json"
        if "index.json" in present:
            found = json.loads((self.output / "index.json").read_text("utf-8")).get("build", {})
        elif identity.is_file():
            found = json.loads(identity.read_text("utf-8"))
        else:
            write_json(identity, self.identity)
            return
        differing = [name for name in self.identity if found.get(name) != self.identity[name]]
        if differing:
            told = "; ".join(f"{name} {found.get(name)!r}, now {self.identity[name]!r}" for name in differing)
            raise FileExistsError(
                f"{self.output} was built from other prompts or settings ({told}); name another output, or delete "
                f"it first"
            )

    def _numbered(self, shards: set[int]) -> Iterator[tuple[int, Line]]:
        if not shards:
            return
        usable = (line for line in self.plan.lines() if isinstance(line, Line))
        for row, line in enumerate(usable):
            if (number := row // self.settings.shard_size) in shards:
                yield number, line

    def _write(self, number: int, lines: Iterator[Line]) -> None:
        rejected: list[Rejected] = []
        records = self._encoded(lines, rejected)
        path = self.output / f"{self.content.name}-{number:06d}.tar"
        shard = write_shard(path, records, number * self.settings.shard_size, self._layout())
        write_json(self._note(number), {**shard, "rejected": rejected})

    def _encoded(self, lines: Iterator[Line], rejected: list[Rejected]) -> Iterator[PromptRecord]:
        while batch := list(islice(lines, self.settings.batch_size)):
            records = [record for line in batch if (record := self._complete(line, rejected))]
            tensors = iter(self._encode_once([record.prompt for record in records if not record.conditioning]))
            negatives = self._negatives({record.negative_prompt for record in records})
            for record in records:
                conditioning = record.conditioning or next(tensors)
                yield replace(record, conditioning=conditioning, negative=negatives.get(record.negative_prompt, {}))

    def _negatives(self, texts: set[str | None]) -> dict[str | None, Mapping[str, Tensor]]:
        """The conditioning of negative prompts that are not the folder's."""
        own = sorted(text for text in texts if text is not None and text != self.settings.negative_prompt)
        return dict(zip(own, self._encode_once(own), strict=True))

    def _complete(self, line: Line, rejected: list[Rejected]) -> PromptRecord | None:
        try:
            return self.content.complete(line)
        except (ImageError, VideoError) as error:  # a disk that fails is no reason to leave a prompt out
            if self.plan.on_error == "stop":
                raise PromptFileError(f"{line.place}: {error}") from error
            rejected.append(Rejected(line.place, str(error)))
            return None

    def _layout(self) -> dict[str, Any]:
        path = self.output / NEGATIVE
        if not path.is_file():
            tensors = self._encode([self.settings.negative_prompt])
            write_negative(self.output, {name: value[0] for name, value in tensors.items()})
        return layout_of(safetensors.torch.load(path.read_bytes()), self.policy.max_sequence_length)

    def _note(self, number: int) -> Path:
        return self._notes / f"{number:06d}.json"

    def _finish(self) -> bool:
        try:
            notes = [json.loads(self._note(number).read_text("utf-8")) for number in range(self.num_shards)]
        except FileNotFoundError:  # another rank still writes shards, or has just finished the folder
            return (self.output / "index.json").is_file()
        for note in notes:
            if not note["count"]:
                (self.output / note["name"]).unlink(missing_ok=True)  # all of its prompts were skipped
        skipped = self._list_skipped([Rejected(*fields) for note in notes for fields in note["rejected"]])
        build = {**self.identity, "skipped": skipped}
        write_index(self.output, notes, self.policy, self.settings.negative_prompt, build, self.content.stamp)
        self._clean()
        return True

    def _list_skipped(self, undecodable: list[Rejected]) -> int:
        if not (self.plan.rejected or undecodable):
            return 0
        unusable = (line for line in self.plan.lines() if isinstance(line, Rejected))
        with atomic_file(self.output / SKIPPED) as aside, aside.open("w", encoding="utf-8") as stream:
            for line in chain(unusable, undecodable):
                stream.write(json.dumps(line._asdict()) + "\n")
        return self.plan.rejected + len(undecodable)

    def _clean(self) -> None:
        for path in self.output.glob(f".{self.content.name}-*.partial-*"):  # of builds that were killed
            path.unlink(missing_ok=True)
        shutil.rmtree(self._notes, ignore_errors=True)  # ranks that end together delete it together
