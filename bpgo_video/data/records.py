"""Prompts on disk: a prompt is a group of tar members with one key; shards have an index. Nothing is ever unpickled.

{key}.json                  id, prompt, negative prompt, split, tags, info, and the sha256 of everything below
{key}.safetensors           what the policy's transformer is conditioned on
{key}.negative.safetensors  the same for the prompt's own negative prompt, if it has one
{key}.image.png             optional, or jpg, webp: the first frame of image-to-video, unchanged
{key}.video.mp4             optional, or mkv, mov, webm: a reference video, unchanged
{key}.clip.safetensors      optional: a video clip that the prompt describes, encoded by the policy's VAE

Each shard stores equal conditioning once, with the first record that has it; later records refer to its sha256.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import webdataset
from torch import Tensor
from torch.nn.functional import pad
from webdataset.tariterators import group_by_keys, tar_file_expander

from bpgo_video.data.media import MEDIA, Media
from bpgo_video.documents import check_seal, plain_json, sealed
from bpgo_video.errors import InputError, shown
from bpgo_video.files import atomic_file, fingerprint, write_json

FORMAT_VERSION = 2  # 1 has no conditioning that refers to an earlier record of the shard
NEGATIVE = "negative.safetensors"
TENSORS = {"conditioning": "safetensors", "negative": "negative.safetensors"}  # field of a record -> member's extension
CLIP = "clip.safetensors"
KINDS = {  # member's extension -> what it holds
    "json": "json",
    **{extension: kind for kind, extension in TENSORS.items()},
    CLIP: "clip",
    **{f"{kind}.{extension}": kind for kind, extensions in MEDIA.items() for extension in extensions},
}
HASH = re.compile("[0-9a-f]{16,}")
LATENTS = "latents"  # the tensor of a clip that flow matching learns to make; the others are conditioning


class ShardError(InputError):
    """Prompt shards that are missing, incomplete, damaged or made for something else."""


@dataclass(frozen=True)
class PromptRecord:
    """A prompt and what the policy's transformer is conditioned on for it.

    Attributes:
        id: unique within a folder of shards, from 0 to 2^63 - 1.
        negative_prompt: the prompt's own; None selects the folder's.
        conditioning: tensors without a batch axis; those with two axes are (tokens, dim).
        negative: the same for the negative prompt. In a shard, empty if that is the folder's.
        media: "image" and "video", if the prompt has them.
        info: further JSON data of the source, such as VBench's auxiliary_info.
        clip: without a batch axis, LATENTS [channels, latent_frames, latent_height, latent_width], normalised as the
            policy's are, and for image-to-video the conditioning that the first frame adds.
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


@dataclass(frozen=True)
class EncoderStamp:
    """What made embeddings: the policy folder's name, the fingerprint of its text encoder, and its text length."""

    name: str
    fingerprint: str
    max_sequence_length: int


def encoder_stamp(folder: Path, max_sequence_length: int) -> EncoderStamp:
    """The stamp of a policy folder's text encoders and tokenizers."""
    names = ("text_encoder_", "tokenizer_", "connectors")
    further = {path.name for path in folder.iterdir() if path.name.startswith(names)}
    components = sorted({"text_encoder", "tokenizer"} | further)
    return EncoderStamp(folder.name, fingerprint(folder, components), max_sequence_length)


def prompt_id(prompt: str) -> int:
    """The default id of a prompt: 63 bits of the blake2b hash of its text."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "big") >> 1


class ByteRange(NamedTuple):
    """Bytes [start, stop) of a file."""

    start: int
    stop: int

    def read(self, path: Path) -> bytes:
        with path.open("rb") as stream:
            stream.seek(self.start)
            return stream.read(self.stop - self.start)


def layout_of(tensors: Mapping[str, Tensor], max_sequence_length: int = 0) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each tensor by name, with (tokens, dim) raised to the policy's text length.

    Texts that are encoded with the tokens of an image are longer than that; they keep their length.
    """
    layout: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        shape = list(value.shape)
        if len(shape) == 2:
            shape[0] = max(shape[0], max_sequence_length)
        layout[name] = {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
    return layout


def check_layout(tensors: Mapping[str, Tensor], layout: Mapping[str, Any], owner: str) -> None:
    """Raise ShardError if the tensors have another layout than the rest of the folder, with which they are batched."""
    if (found := layout_of(tensors)) != layout:
        raise ShardError(f"{owner} has the tensors {found}, the other records have {layout}; build them all alike")


def to_layout(conditioning: Mapping[str, Tensor], layout: Mapping[str, Any], owner: str) -> dict[str, Tensor]:
    """Zero-pad (tokens, dim) tensors to the policy's text length, as diffusers' Wan pipelines do."""
    padded = {}
    for name, value in conditioning.items():
        shape = layout[name]["shape"] if name in layout else []
        missing = shape[0] - value.shape[0] if value.ndim == len(shape) == 2 else 0
        padded[name] = pad(value, (0, 0, 0, missing)) if missing > 0 else value
    check_layout(padded, layout, owner)
    return padded


def without_batch(tensors: Mapping[str, Tensor], row: int = 0) -> dict[str, Tensor]:
    """One row of batched tensors."""
    return {name: value[row] for name, value in tensors.items()}


def tensor_bytes(conditioning: Mapping[str, Tensor]) -> bytes:
    """Safetensors without the trailing zero rows of (tokens, dim) tensors; `to_layout` restores them."""
    trimmed = {}
    for name, value in conditioning.items():
        if value.ndim == 2:
            used = value.ne(0).any(1).nonzero()
            value = value[: int(used[-1]) + 1 if len(used) else 1]
        trimmed[name] = value.detach().cpu().contiguous()
    return safetensors.torch.save(trimmed)


def to_members(record: PromptRecord, stored: set[str]) -> dict[str, bytes]:
    """A record's tar members by extension.

    Args:
        stored: sha256 of all conditioning already in the shard, which is not repeated; the record's are added.
    """
    tensors = {kind: tensor_bytes(values) for kind in TENSORS if (values := getattr(record, kind))}
    hashes = {kind: hashlib.sha256(data).hexdigest() for kind, data in tensors.items()}
    files = {f"{kind}.{media.extension}": media.data for kind, media in record.media.items()}
    if record.clip:
        files[CLIP] = safetensors.torch.save({name: value.contiguous() for name, value in record.clip.items()})
    header = {
        "id": record.id,
        "prompt": record.prompt,
        **({} if record.negative_prompt is None else {"negative_prompt": record.negative_prompt}),
        "split": record.split,
        "tags": list(record.tags),
        **{f"{kind}_sha256": digest for kind, digest in hashes.items()},
        **({"info": dict(record.info)} if record.info else {}),
        **{f"{KINDS[name]}_sha256": hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    new = {}
    for kind, data in tensors.items():
        if hashes[kind] not in stored:
            stored.add(hashes[kind])
            new[TENSORS[kind]] = data
    return {"json": json.dumps(sealed(header), ensure_ascii=False).encode(), **new, **files}


def parse_header(data: bytes) -> dict[str, Any]:
    """The JSON of a record. Raises ValueError if a field is missing or has another type."""
    header = plain_json(data, "its JSON")
    if not isinstance(header, dict):
        raise ValueError("its JSON is not an object")
    check_seal(header, "its JSON")
    types = {"id": int, "prompt": str, "split": str, "tags": list, "conditioning_sha256": str}
    types |= {name: str for name in ("negative_prompt", "negative_sha256") if name in header}
    types |= {"info": dict} if "info" in header else {}
    for name, kind in types.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"{name!r} of its JSON is {shown(header.get(name))}, which is not of type {kind.__name__}")
    if not all(isinstance(tag, str) for tag in header["tags"]):
        raise ValueError(f"'tags' of its JSON are {shown(header['tags'])}, which are not all text")
    if not 0 <= header["id"] < 2**63:
        raise ValueError(f"'id' of its JSON is {shown(header['id'])}; ids go from 0 to 2^63 - 1")
    return dict(header)


def read_record(shard: Path, record: ByteRange, tensors: Mapping[str, ByteRange]) -> PromptRecord:
    """Read one record and check it against its hashes.

    Args:
        record: the bytes of the record's members.
        tensors: the bytes of its conditioning and negative conditioning, which may belong to an earlier record.

    Raises:
        ShardError: the record is damaged; the message names file and record.
    """
    data = record.read(shard)
    key = data[:100].split(b"\0")[0].decode(errors="replace").split(".")[0] or f"at byte {record.start}"
    try:
        (members,) = group_by_keys(tar_file_expander([{"url": str(shard), "stream": io.BytesIO(data)}]))
        header = parse_header(members["json"])
    except (tarfile.TarError, ValueError, KeyError) as error:
        raise damaged(shard, key, str(error)) from error
    named = {kind: (name, members[name]) for name, kind in KINDS.items() if name in members}
    contents = {kind: content for kind, (_, content) in named.items()}
    contents |= {kind: place.read(shard) for kind, place in tensors.items() if kind not in contents}
    for kind in (*TENSORS, *MEDIA, "clip"):
        found = hashlib.sha256(contents[kind]).hexdigest() if kind in contents else None
        if found != header.get(f"{kind}_sha256"):
            raise damaged(shard, key, f"its {kind} does not match its sha256")
    return PromptRecord(
        id=header["id"],
        prompt=header["prompt"],
        split=header["split"],
        tags=tuple(header["tags"]),
        negative_prompt=header.get("negative_prompt"),
        media={kind: Media(named[kind][0].split(".")[1], contents[kind]) for kind in MEDIA if kind in named},
        info=header.get("info", {}),
        **{kind: safetensors.torch.load(contents[kind]) for kind in (*TENSORS, "clip") if kind in contents},
    )


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Store tensors without a batch axis, such as the conditioning of a folder's negative prompt."""
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
    write_json(output / "index.json", sealed(index))


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damaged(path: Path, key: str, reason: str) -> ShardError:
    return ShardError(
        f"{path}: record {key}: {reason}. The file is damaged: copy it again, or build the folder again with the "
        "command that made it, bpgo-video prompts or videos"
    )


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """`height 32, here 48; other encoder`: the entries of `expected` that differ; hashes are not shown."""
    changed = {name: value for name, value in expected.items() if found.get(name) != value}
    return "; ".join(
        f"other {name}" if HASH.fullmatch(str(value)) else f"{name} {found.get(name)!r}, here {value!r}"
        for name, value in changed.items()
    )
