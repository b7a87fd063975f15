"""Building a folder of shards: encoded shard by shard on any number of ranks, resumable, completed by its index.

While a build is unfinished, its folder holds `.unfinished/`: what the build depends on (identity.json), a note for each
finished shard, and the conditioning of repeated texts. The same command continues after the last whole shard. Rank r of
n writes the shards r, r + n, ...; ranks share nothing but the folder, and the one that finds all shards finished writes
index.json. A build that replaces another one is made next to it, and takes its place when it is complete.
"""

from __future__ import annotations

import glob
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from more_itertools import chunked
from pydantic import BaseModel, TypeAdapter
from torch import Tensor
from tqdm import tqdm

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data import SKIPPED
from bpgo_video.data.clips import read_clip
from bpgo_video.data.media import ImageError, Size, VideoError, decode_image, fit_image, read_media
from bpgo_video.data.prompt_files import Line, Rejected
from bpgo_video.data.prompt_formats import PromptFileError
from bpgo_video.data.prompt_plan import Plan, make_plan
from bpgo_video.data.records import (
    LATENTS,
    NEGATIVE,
    EncoderStamp,
    PromptRecord,
    differences,
    layout_of,
    prompt_id,
    without_batch,
    write_index,
    write_shard,
    write_tensors,
)
from bpgo_video.documents import read_json
from bpgo_video.files import atomic_file, fingerprint, write_json

UNFINISHED = ".unfinished"
IDENTITY = TypeAdapter(dict[str, Any])

Load = Callable[[], Any]  # loads the policy at the first call
Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]  # texts -> tensors; axis 0 is the text


class _Index(BaseModel):
    build: dict[str, Any] = {}


INDEX = TypeAdapter(_Index)


class OutputError(FileExistsError):
    """A folder that holds something else than the build to make or to continue."""

    exit_code = 2


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


def image_text_content(policy: Load, folder: Path, size: Size) -> Content:
    """Records with embeddings of text and image together. Equal texts with different images differ.

    Args:
        folder: the policy's pipeline folder.
        size: of the videos that will be made.
    """

    def complete(line: Line) -> PromptRecord:
        record = with_media(line)
        image = fit_image(decode_image(record.media["image"].data, f"prompt {record.prompt!r}"), *size)
        return replace(record, conditioning=without_batch(policy().encode_with_images([record.prompt], image[None])))

    return Content(complete=complete, stamp=image_stamp(folder, size))


def clip_content(policy: Load, described: Any, folder: Path, video: VideoConfig, dtype: torch.dtype) -> Content:
    """Records with clips, encoded by the VAE; for image-to-video also with the conditioning on the first frame.

    Args:
        described: the policy without networks.
        folder: the policy's pipeline folder.
        dtype: of the stored tensors.
    """

    def complete(line: Line) -> PromptRecord:
        path = line.media["video"]
        assert isinstance(path, Path)  # of `read_clips`
        frames = read_clip(path, line.record.info["start"], video)
        clip = {LATENTS: policy().encode_video(frames[None])}
        if described.takes_images:
            clip |= policy().image_conditioning(frames[:1], video)
        conditioning = {}
        if described.texts_see_images:
            conditioning = without_batch(policy().encode_with_images([line.record.prompt], frames[:1]))
        stored = {name: value.to("cpu", dtype) for name, value in without_batch(clip).items()}
        return replace(line.record, clip=stored, conditioning=conditioning)

    images = image_stamp(folder, (video.height, video.width)) if described.texts_see_images else {}
    return Content("clips", complete, clip_stamp(folder, video, described.takes_images) | images)


def image_stamp(folder: Path, size: Size) -> dict[str, Any]:
    """The index's entry on images that texts were encoded with: their size and the hash of the image processor."""
    height, width = size
    return {"images": {"height": height, "width": width, "processor": fingerprint(folder, ("image_processor",))}}


def clip_stamp(folder: Path, video: VideoConfig, takes_images: bool) -> dict[str, Any]:
    """The index's entry on clips: frames, size, frame rate, and the hash of the networks that encode them."""
    parts = ("vae", "image_encoder") if takes_images and (folder / "image_encoder").is_dir() else ("vae",)
    return {"video": {**asdict(video), "encoder": fingerprint(folder, parts)}}


def require_images(plan: Plan) -> None:
    """Raise PromptFileError, naming the line, if a prompt of the plan has no image."""
    for line in plan.lines():
        if isinstance(line, Line) and "image" not in line.media:
            raise PromptFileError(
                f"{line.place}: the prompt has no image, and this policy's text encoder reads the image with the text; "
                "give .jsonl or .csv lines with an 'image'"
            )


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
        overwrite: replace shards of other prompts or settings, once these are complete.
        again: how to make this build with `overwrite`, for a message.
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
    overwrite: bool = False
    again: str = "overwrite=True"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the bytes of the folder depend on."""
        return {
            "prompts": self.plan.digest,
            "count": self.plan.count,
            "holdout": self.plan.holdout,
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
            OutputError: the folder holds something else, or shards of other prompts or settings, which are named.
            PromptFileError: an image or video does not decode, and the plan's `on_error` is "stop".
        """
        self._restore()
        with self._undisturbed():
            changes = self._begin()
        if changes:
            aside = self._hidden(f"new-{hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:8]}")
            complete = replace(self, output=aside, overwrite=False).run(rank, world_size, show_progress)
            if complete:
                self._replace_by(aside)
            return complete
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

    def _hidden(self, name: str) -> Path:
        """A file or folder next to the output."""
        return self.output.with_name(f".{self.output.name}.{name}")

    def _undisturbed(self) -> AbstractContextManager[Any]:
        """The block in which no other rank replaces the output."""
        return FileLock(self._hidden("replacing")) if self.overwrite else nullcontext()

    def _begin(self) -> str:
        """Start the build, or find what differs from the one in the folder, which is wanted only with `overwrite`."""
        present = {path.name for path in self.output.iterdir()} if self.output.exists() else set()
        if present and not present & {UNFINISHED, "index.json"}:
            raise OutputError(f"{self.output} exists and is not empty; name another output, or delete it first")
        identity = self.output / UNFINISHED / "identity.json"
        if "index.json" in present:
            found = read_json(INDEX, self.output / "index.json", "delete the folder, to build it again").build
        elif identity.is_file():
            found = read_json(IDENTITY, identity, f"delete {identity.parent}, to build again")
        else:
            write_json(identity, self.identity)
            return ""
        changes = differences({"holdout": 0.0, **found}, self.identity)
        if changes and not self.overwrite:
            raise OutputError(
                f"{self.output} was built from other prompts or settings ({changes}). To replace it, and the priors in "
                f"it, run: {self.again}"
            )
        return changes

    def _replace_by(self, aside: Path) -> None:
        """Let a complete build take the place of the output; the first rank that arrives does it."""
        with self._undisturbed():
            if aside.is_dir():
                self.output.rename(self._hidden(f"old-{secrets.token_hex(4)}"))
                aside.rename(self.output)
                for path in (*self._asides("old"), *self._asides("new")):  # "new": of builds that were given up
                    _remove(path)

    def _asides(self, kind: str) -> list[Path]:
        return sorted(self.output.parent.glob(f"{glob.escape(self._hidden(kind).name)}-????????"))

    def _restore(self) -> None:
        """Finish a replacement that was killed: the new shards stay if they are in place, else the old ones return."""
        if not self._asides("old"):
            return
        with FileLock(self._hidden("replacing")):
            for path in self._asides("old"):
                if self.output.exists() or not (path / "index.json").is_file():
                    _remove(path)
                else:
                    path.rename(self.output)

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
        kept = {text: self._kept(self._repeated(text), text) for text in texts if prompt_id(text) in self.plan.repeated}
        others = [text for text in texts if text not in kept]
        batch = self.encode(others) if others else {}
        rows = (without_batch(batch, row) for row in range(len(others)))
        return [kept[text] if text in kept else next(rows) for text in texts]

    def _repeated(self, text: str) -> Path:
        name = f"{prompt_id(text):016x}"
        return self.output / UNFINISHED / "texts" / name[:2] / f"{name}.safetensors"  # at most 256 files per folder

    def _kept(self, path: Path, text: str) -> dict[str, Tensor]:
        """The conditioning of a text that is encoded alone, stored in a file."""
        if not path.is_file():
            write_tensors(path, without_batch(self.encode([text])))
        return safetensors.torch.load(path.read_bytes())

    def _layout(self) -> dict[str, Any]:
        negative = self._kept(self.output / NEGATIVE, self.negative_prompt)
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
        for name in (f"{self.content.name}-*", NEGATIVE):
            for path in self.output.glob(f".{name}.partial-*"):  # of builds that were killed
                path.unlink(missing_ok=True)
        shutil.rmtree(self.output / UNFINISHED, ignore_errors=True)  # ranks may delete it at the same time


def _remove(folder: Path) -> None:
    """Remove a folder of shards such that a kill leaves none that looks complete."""
    (folder / "index.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def build_shards(
    inputs: Iterable[Path | str], output: Path | str, encode: Encode, policy: EncoderStamp, **settings: Any
) -> None:
    """Build shards of prompt files on this process alone; `settings` are those of Build."""
    Build(make_plan(inputs), Path(output), encode, policy, **settings).run()
