"""How do lines of text become prompt shards? Read and checked first, then encoded batch by batch into tar files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from bpgo_video.data.images import decode_image, image_extension
from bpgo_video.data.prompt_records import MEDIA, EncoderStamp, Media, PromptRecord
from bpgo_video.data.shards import write_shards
from bpgo_video.data.video import read_video

Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]  # texts -> tensors whose axis 0 is the texts
FIELDS = {"prompt": str, "id": int, "split": str, "tags": list, "image": str, "video": str}


Parsed = tuple[PromptRecord, Mapping[str, str]]  # and the names of its image and video files


class PromptFileError(ValueError):
    """A prompt file that cannot be used as it is; the message names the file and the line."""


class Line(NamedTuple):
    """A prompt, not yet encoded, the place it comes from, and the files of its image and video."""

    record: PromptRecord
    place: str
    media: Mapping[str, Path]


def prompt_id(prompt: str) -> int:
    """A prompt's default id: 63 bits of the blake2b hash of its text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 1


def read_prompts(inputs: Iterable[Path | str], split: str = "train") -> Iterator[Line]:
    """The prompts of .txt files (one a line) and .jsonl files, in order.

    A line of .jsonl is {"prompt", "id"?, "split"?, "tags"?, "image"?, "video"?}, the last two relative to its folder.

    Args:
        split: of the prompts that do not name one.

    Raises:
        PromptFileError: an unknown kind of file, an empty or malformed line, or text that is not UTF-8.
    """
    for path in map(Path, inputs):
        if path.suffix not in PARSERS:
            raise PromptFileError(f"{path}: prompts are read from {', '.join(PARSERS)}, not {path.suffix!r}")
        if not path.is_file():
            raise PromptFileError(f"{path} does not exist")
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                place = f"{path}:{number}"
                try:
                    record, media = PARSERS[path.suffix](line.decode("utf-8").strip(), split)
                    files = {kind: _media_path(path.parent, name) for kind, name in media.items()}
                except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                    raise PromptFileError(f"{place}: {error}") from error
                yield Line(record, place, files)


def check_prompts(inputs: Sequence[Path | str], split: str = "train") -> int:
    """Read everything once, keep the ids alone, and return how many prompts there are.

    Raises:
        PromptFileError: see `read_prompts`; no prompts at all; or two lines with one id, both named.
    """
    ids = np.fromiter((line.record.id for line in read_prompts(inputs, split)), dtype=np.int64)
    if not len(ids):
        raise PromptFileError(f"there are no prompts in {', '.join(map(str, inputs))}")
    order = np.argsort(ids, kind="stable")
    repeated = np.flatnonzero(np.diff(ids[order]) == 0)
    if len(repeated):
        numbers = order[repeated[0] : repeated[0] + 2].tolist()
        lines = {i: line for i, line in enumerate(read_prompts(inputs, split)) if i in numbers}
        first, second = (lines[number] for number in numbers)
        raise PromptFileError(
            f"{first.place} and {second.place} have the same id {first.record.id} ({first.record.prompt!r} and "
            f"{second.record.prompt!r}); remove one line, or give it another id in a .jsonl file"
        )
    return len(ids)


def build_shards(
    inputs: Sequence[Path | str],
    output: Path | str,
    encode: Encode,
    policy: EncoderStamp,
    *,
    split: str = "train",
    negative_prompt: str = "",
    shard_size: int = 1000,
    batch_size: int = 32,
    progress: Callable[[Iterable[PromptRecord]], Iterable[PromptRecord]] = iter,
) -> None:
    """Encode the prompts of `inputs` and write them to the directory `output`.

    Args:
        encode: the policy's text encoder.
        policy: what it is.
        batch_size: prompts encoded at once.
        progress: wraps the iterable of records, such as tqdm.
    """
    negative = {name: value[0] for name, value in encode([negative_prompt]).items()}
    records = _encoded(map(_with_media, read_prompts(inputs, split)), encode, batch_size)
    write_shards(
        iter(progress(records)),
        output,
        negative=negative,
        negative_prompt=negative_prompt,
        policy=policy,
        shard_size=shard_size,
    )


def _encoded(records: Iterable[PromptRecord], encode: Encode, batch_size: int) -> Iterator[PromptRecord]:
    records = iter(records)
    while batch := list(islice(records, batch_size)):
        tensors = encode([record.prompt for record in batch])
        for i, record in enumerate(batch):
            yield replace(record, conditioning={name: value[i] for name, value in tensors.items()})


def _media_path(folder: Path, name: str) -> Path:
    """A file named relative to the prompt file's folder, and not outside of it."""
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
        raise ValueError(f"the path {name!r} leads out of the folder of the prompt file; put the file into it")
    if not (folder / inside).is_file():
        raise ValueError(f"the file {folder / inside} does not exist")
    return folder / inside


def _with_media(line: Line) -> PromptRecord:
    media = {}
    for kind, path in line.media.items():
        data = path.read_bytes()
        try:
            media[kind] = Media(EXTENSION_OF[kind](path, data), data)
        except ValueError as error:
            raise PromptFileError(f"{line.place}: {error}") from error
    return replace(line.record, media=media)


def _image_extension(path: Path, data: bytes) -> str:
    decode_image(data, str(path))
    return image_extension(data, str(path))


def _video_extension(path: Path, data: bytes) -> str:
    extension = path.suffix.removeprefix(".").lower()
    if extension not in MEDIA["video"]:
        raise ValueError(f"{path}: videos are {', '.join(MEDIA['video'])} files")
    read_video(path)
    return extension


EXTENSION_OF: Mapping[str, Callable[[Path, bytes], str]] = {"image": _image_extension, "video": _video_extension}


def _parse_text(line: str, split: str) -> Parsed:
    if not line:
        raise ValueError("the line is empty; remove it")
    return PromptRecord(prompt_id(line), line, split), {}


def _parse_json(line: str, split: str) -> Parsed:
    if not line:
        raise ValueError("the line is empty; remove it")
    content: dict[str, Any] = json.loads(line)
    if not isinstance(content, dict) or not content.get("prompt"):
        raise ValueError('each line must be an object with a "prompt"')
    for name, value in content.items():
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r}; known are {', '.join(FIELDS)}")
        if not isinstance(value, FIELDS[name]):
            raise ValueError(f"{name!r} is {value!r}, which is not of type {FIELDS[name].__name__}")
    prompt = content["prompt"]
    key = content.get("id", prompt_id(prompt))
    if not 0 <= key < 2**63:
        raise ValueError(f"the id is {key}; ids go from 0 to 2^63 - 1")
    record = PromptRecord(key, prompt, content.get("split", split), tuple(content.get("tags", ())))
    return record, {kind: content[kind] for kind in MEDIA if kind in content}


PARSERS: Mapping[str, Callable[[str, str], Parsed]] = {".txt": _parse_text, ".jsonl": _parse_json}
