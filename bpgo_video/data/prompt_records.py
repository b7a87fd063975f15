"""What is one prompt on disk? Members of a tar file with one key; nothing is unpickled.

{key}.json               id, prompt, split, tags, and the sha256 of the other members
{key}.safetensors        what the policy's transformer is conditioned on
{key}.image.png          optional, or jpg, webp: the first frame of image-to-video, in the bytes it came in
{key}.video.mp4          optional, or mkv, mov, webm: a reference video, in the bytes it came in
{key}.clip.safetensors   optional: a video clip that the prompt describes, as the policy's own VAE encodes it
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
        conditioning: tensors without a batch axis; those with two axes are (tokens, dim).
        media: "image" and "video", where the prompt has them.
        info: what else its source says, as JSON; VBench's auxiliary_info, for example.
        clip: without a batch axis, a clip's LATENTS [channels, latent_frames, latent_height, latent_width], normalised
            as the policy's are, and for image-to-video what its first frame adds to the conditioning.
    """

    id: int
    prompt: str
    split: str = "train"
    tags: tuple[str, ...] = ()
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    media: Mapping[str, Media] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    clip: Mapping[str, Tensor] = field(default_factory=dict)


class Place(NamedTuple):
    """Where a record lies: bytes [start, stop) of a shard."""

    shard: Path
    start: int
    stop: int


@dataclass(frozen=True)
class EncoderStamp:
    """What made the embeddings: the policy folder's name, the fingerprint of its encoder, and its text length."""

    name: str
    fingerprint: str
    max_sequence_length: int


def layout_of(conditioning: Mapping[str, Tensor], max_sequence_length: int) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each tensor as the policy wants it: (tokens, dim) is padded to the policy's text length."""
    layout = plain_layout(conditioning)
    for value in layout.values():
        if len(value["shape"]) == 2:
            value["shape"][0] = max_sequence_length
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


def to_members(record: PromptRecord) -> dict[str, bytes]:
    """The contents of a record's tar members by the name after its key; the JSON carries the hashes of the others."""
    tensors = {"safetensors": tensor_bytes(record.conditioning)}
    if record.clip:
        tensors["clip.safetensors"] = safetensors.torch.save({k: v.contiguous() for k, v in record.clip.items()})
    header = {
        "id": record.id,
        "prompt": record.prompt,
        "split": record.split,
        "tags": list(record.tags),
        "conditioning_sha256": hashlib.sha256(tensors["safetensors"]).hexdigest(),
        **({"info": dict(record.info)} if record.info else {}),
        **{f"{kind}_sha256": hashlib.sha256(media.data).hexdigest() for kind, media in record.media.items()},
        **({"clip_sha256": hashlib.sha256(tensors["clip.safetensors"]).hexdigest()} if record.clip else {}),
    }
    files = {f"{kind}.{media.extension}": media.data for kind, media in record.media.items()}
    return {"json": json.dumps(header, ensure_ascii=False).encode(), **tensors, **files}


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
    with place.shard.open("rb") as stream:
        stream.seek(place.start)
        data = stream.read(place.stop - place.start)
    key = data[:100].split(b"\0")[0].decode(errors="replace").split(".")[0] or f"at byte {place.start}"
    try:
        files = tar_file_expander([{"url": str(place.shard), "stream": io.BytesIO(data)}])
        (members,) = group_by_keys(files)
        header = parse_header(members["json"])
        tensors = members["safetensors"]
    except (tarfile.TarError, ValueError, KeyError) as error:
        raise damaged(place.shard, key, str(error)) from error
    if hashlib.sha256(tensors).hexdigest() != header["conditioning_sha256"]:
        raise damaged(place.shard, key, "its tensors do not match their sha256")
    media, clip = _media(members), members.get("clip.safetensors")
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
        conditioning=safetensors.torch.load(tensors),
        media=media,
        info=header.get("info", {}),
        clip={} if clip is None else safetensors.torch.load(clip),
    )


def _media(members: Mapping[str, Any]) -> dict[str, Media]:
    named = [(kind, extension) for kind, extensions in MEDIA.items() for extension in extensions]
    return {kind: Media(ext, members[f"{kind}.{ext}"]) for kind, ext in named if f"{kind}.{ext}" in members}


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


def damaged(path: Path, key: str, reason: str) -> ShardError:
    return ShardError(
        f"{path}: record {key}: {reason}. The file is damaged: copy it again, or build the directory again "
        f"with the program in tools/ that made it"
    )
