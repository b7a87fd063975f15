"""What is one prompt on disk? Members of a tar file with one key; nothing is unpickled.

{key}.json                  id, prompt, negative prompt, split, tags, and the sha256 of all that belongs to it
{key}.safetensors           what the policy's transformer is conditioned on
{key}.negative.safetensors  where the prompt has a negative prompt of its own: the same of that
{key}.image.png             optional, or jpg, webp: the first frame of image-to-video, in the bytes it came in
{key}.video.mp4             optional, or mkv, mov, webm: a reference video, in the bytes it came in
{key}.clip.safetensors      optional: a video clip that the prompt describes, as the policy's own VAE encodes it

Conditioning that an earlier record of the file has is not repeated: its sha256 finds it.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import pad
from webdataset.tariterators import group_by_keys, tar_file_expander

from bpgo_video.data.images import EXTENSIONS

MEDIA: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"image": tuple(EXTENSIONS.values()), "video": ("mp4", "mkv", "mov", "webm")}  # extensions of each kind
)

TENSORS: Mapping[str, str] = MappingProxyType(
    {"conditioning": "safetensors", "negative": "negative.safetensors"}  # field of a record -> extension of its member
)
CLIP = "clip.safetensors"
LATENTS = "latents"  # of a clip's tensors, what flow matching learns to make; the others are conditioning


class ShardError(ValueError):
    """Prompt shards that are missing, incomplete, damaged or made for something else."""


class Media(NamedTuple):
    """An image or video file as it came: its extension, without the dot, and its bytes."""

    extension: str
    data: bytes


@dataclass(frozen=True)
class PromptRecord:
    """A prompt and what the policy's transformer is conditioned on for it.

    Attributes:
        id: unique within a directory, from 0 to 2^63 - 1.
        negative_prompt: of its own; None stands for the folder's.
        conditioning: tensors without a batch axis; those with two axes are (tokens, dim).
        negative: the same of the negative prompt; in a shard, empty where that is the folder's.
        media: "image" and "video", where the prompt has them.
        info: what else its source says, as JSON; VBench's auxiliary_info, for example.
        clip: without a batch axis, a clip's LATENTS [channels, latent_frames, latent_height, latent_width], normalised
            as the policy's are, and for image-to-video what its first frame adds to the conditioning.
    """

    id: int
    prompt: str
    split: str = "train"
    tags: tuple[str, ...] = ()
    negative_prompt: str | None = None
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    negative: Mapping[str, Tensor] = field(default_factory=dict)
    media: Mapping[str, Media] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    clip: Mapping[str, Tensor] = field(default_factory=dict)


class Span(NamedTuple):
    """Bytes [start, stop) of a file."""

    start: int
    stop: int


class Place(NamedTuple):
    """Where a record lies in a shard, and where its tensors do, by the field of the record: there or before."""

    shard: Path
    record: Span
    tensors: Mapping[str, Span]


@dataclass(frozen=True)
class EncoderStamp:
    """What made the embeddings: the policy folder's name, the fingerprint of its encoder, and its text length."""

    name: str
    fingerprint: str
    max_sequence_length: int


def layout_of(conditioning: Mapping[str, Tensor], max_sequence_length: int) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each tensor as the policy wants it: (tokens, dim) is padded to the policy's text length.

    Where a text stands beside an image's tokens it is longer than that, and stays as long as it is.
    """
    layout = plain_layout(conditioning)
    for value in layout.values():
        if len(value["shape"]) == 2:
            value["shape"][0] = max(value["shape"][0], max_sequence_length)
    return layout


def plain_layout(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each tensor as it is."""
    return {
        name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        for name, value in tensors.items()
    }


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


def to_members(record: PromptRecord, stored: set[str]) -> dict[str, bytes]:
    """The contents of a record's tar members by the name after its key; the JSON carries the hashes of the others.

    Args:
        stored: hashes of the conditioning that the shard has, which is not repeated; the record's are added.
    """
    tensors = {name: tensor_bytes(values) for name in TENSORS if (values := getattr(record, name))}
    hashes = {f"{name}_sha256": hashlib.sha256(data).hexdigest() for name, data in tensors.items()}
    files = {f"{kind}.{media.extension}": media.data for kind, media in record.media.items()}
    if record.clip:
        files[CLIP] = safetensors.torch.save({name: value.contiguous() for name, value in record.clip.items()})
    header = {
        "id": record.id,
        "prompt": record.prompt,
        **({} if record.negative_prompt is None else {"negative_prompt": record.negative_prompt}),
        "split": record.split,
        "tags": list(record.tags),
        **hashes,
        **({"info": dict(record.info)} if record.info else {}),
        **{f"{name.split('.')[0]}_sha256": hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    new = {}
    for name, data in tensors.items():
        if (digest := hashes[f"{name}_sha256"]) not in stored:
            stored.add(digest)
            new[TENSORS[name]] = data
    return {"json": json.dumps(header, ensure_ascii=False).encode(), **new, **files}


def tensor_bytes(conditioning: Mapping[str, Tensor]) -> bytes:
    """Safetensors without the zero rows that end a (tokens, dim) tensor; the reader puts them back."""
    return safetensors.torch.save({name: _trim(value.detach().cpu()) for name, value in conditioning.items()})


def _trim(value: Tensor) -> Tensor:
    if value.ndim == 2:
        used = value.ne(0).any(1).nonzero()
        value = value[: int(used[-1]) + 1 if len(used) else 1]
    return value.contiguous()


def read_record(place: Place) -> PromptRecord:
    """One record of a shard, checked against its hashes.

    Raises:
        ShardError: it is damaged; the message names file and record.
    """
    data = _read(place.shard, place.record)
    key = data[:100].split(b"\0")[0].decode(errors="replace").split(".")[0] or f"at byte {place.record.start}"
    try:
        files = tar_file_expander([{"url": str(place.shard), "stream": io.BytesIO(data)}])
        (members,) = group_by_keys(files)
        header = parse_header(members["json"])
    except (tarfile.TarError, ValueError, KeyError) as error:
        raise damaged(place.shard, key, str(error)) from error
    tensors = {}
    for name, span in place.tensors.items():
        stored = members.get(TENSORS[name]) or _read(place.shard, span)
        if hashlib.sha256(stored).hexdigest() != header[f"{name}_sha256"]:
            raise damaged(place.shard, key, f"its {name} tensors do not match their sha256")
        tensors[name] = safetensors.torch.load(stored)
    media, clip = _media(members), members.get(CLIP)
    parts = {kind: file.data for kind, file in media.items()} | ({} if clip is None else {"clip": clip})
    for kind in (*MEDIA, "clip"):
        found = hashlib.sha256(parts[kind]).hexdigest() if kind in parts else None
        if found != header.get(f"{kind}_sha256"):
            raise damaged(place.shard, key, f"its {kind} does not match its sha256")
    return PromptRecord(
        id=header["id"],
        prompt=header["prompt"],
        split=header["split"],
        tags=tuple(header["tags"]),
        negative_prompt=header.get("negative_prompt"),
        media=media,
        info=header.get("info", {}),
        clip={} if clip is None else safetensors.torch.load(clip),
        **tensors,
    )


def _read(path: Path, span: Span) -> bytes:
    with path.open("rb") as stream:
        stream.seek(span.start)
        return stream.read(span.stop - span.start)


def _media(members: Mapping[str, Any]) -> dict[str, Media]:
    named = [(kind, extension) for kind, extensions in MEDIA.items() for extension in extensions]
    return {kind: Media(ext, members[f"{kind}.{ext}"]) for kind, ext in named if f"{kind}.{ext}" in members}


def parse_header(data: bytes) -> dict[str, Any]:
    """The JSON of a record. Raises ValueError where a field is missing or has another type."""
    header = json.loads(data)
    if not isinstance(header, dict):
        raise ValueError("its JSON is not an object")
    required = {"id": int, "prompt": str, "split": str, "tags": list, "conditioning_sha256": str}
    optional = {"negative_prompt": str, "negative_sha256": str}
    fields = required | {name: kind for name, kind in optional.items() if name in header}
    for name, kind in fields.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"{name!r} of its JSON is {header.get(name)!r}, which is not of type {kind.__name__}")
    return header


def damaged(path: Path, key: str, reason: str) -> ShardError:
    return ShardError(
        f"{path}: record {key}: {reason}. The file is damaged: copy it again, or build the directory again "
        f"with the command that made it, bpgo-video prompts or videos"
    )
