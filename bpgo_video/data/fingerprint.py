"""Short content hashes of model folders, which tell whether two runs used the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

WHOLE_FILE = 2**20  # bytes; larger files are sampled
BLOCKS, BLOCK = 256, 4096


@dataclass(frozen=True)
class EncoderStamp:
    """What made embeddings: the policy folder's name, the fingerprint of its text encoder, and its text length."""

    name: str
    fingerprint: str
    max_sequence_length: int


def encoder_stamp(folder: Path, max_sequence_length: int) -> EncoderStamp:
    """The stamp of a policy folder's text encoders and tokenizers."""
    further = {path.name for path in folder.iterdir() if path.name.startswith(("text_encoder_", "tokenizer_"))}
    components = sorted({"text_encoder", "tokenizer"} | further)
    return EncoderStamp(folder.name, fingerprint(folder, components), max_sequence_length)


def fingerprint(folder: Path | str, components: Sequence[str]) -> str:
    """16 hex digits that change with any file in these subfolders of a diffusers folder.

    Of a file over 1 MiB, the hash covers its size and 256 evenly spaced blocks of 4 KiB, including the first (the
    safetensors header) and the last. A text encoder of 22 GB takes milliseconds, and fine-tuning changes every block.

    Raises:
        FileNotFoundError: `folder` lacks a component.
    """
    folder = Path(folder)
    for component in components:
        if not (folder / component).is_dir():
            raise FileNotFoundError(f"{folder} has no subfolder {component!r}; name a diffusers pipeline folder")
    return _digest(folder, (path for component in components for path in (folder / component).rglob("*")))


def fingerprint_of(folder: Path, patterns: Sequence[str]) -> str:
    """The same hash of the files of `folder` that match one of the glob patterns.

    Raises:
        FileNotFoundError: no file matches.
    """
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if not paths:
        raise FileNotFoundError(f"{folder} has no file like {' or '.join(patterns)}")
    return _digest(folder, paths)


def _digest(folder: Path, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as stream:
            if size <= WHOLE_FILE:
                digest.update(stream.read())
                continue
            for i in range(BLOCKS):
                stream.seek(i * (size - BLOCK) // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]
