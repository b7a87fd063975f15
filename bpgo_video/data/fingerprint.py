"""Which weights made this? A short hash of the parts of a model folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from bpgo_video.data.prompt_records import EncoderStamp

WHOLE_FILE = 2**20  # bytes; larger files are sampled
BLOCKS, BLOCK = 256, 4096


def encoder_stamp(folder: Path, max_sequence_length: int) -> EncoderStamp:
    """What identifies the embeddings that a policy folder's text encoder makes."""
    further = {path.name for path in folder.iterdir() if path.name.startswith(("text_encoder_", "tokenizer_"))}
    parts = {"text_encoder", "tokenizer"} | further
    return EncoderStamp(folder.name, fingerprint(folder, sorted(parts)), max_sequence_length)


def fingerprint(folder: Path | str, components: Sequence[str]) -> str:
    """16 hex digits that change when a file of `components` (subfolders of a diffusers folder) does.

    Of a file over 1 MiB its size and 256 evenly spaced blocks of 4 KiB count, the first (a safetensors header) and the
    last among them: a text encoder of 22 GB takes milliseconds, and fine-tuning moves every block.

    Raises:
        FileNotFoundError: `folder` lacks a component.
    """
    found: list[tuple[str, Path]] = []
    for component in sorted(components):
        root = Path(folder) / component
        if not root.is_dir():
            raise FileNotFoundError(f"{folder} has no subfolder {component!r}; is it a diffusers pipeline folder?")
        files = sorted(path for path in root.rglob("*") if path.is_file())
        found += [(f"{component}/{file.relative_to(root)}", file) for file in files]
    return _digest(found)


def fingerprint_of(folder: Path, patterns: Sequence[str]) -> str:
    """The same of the files that match one of `patterns`, whatever else the folder holds.

    Raises:
        FileNotFoundError: none matches.
    """
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise FileNotFoundError(f"{folder} has no file like {' or '.join(patterns)}")
    return _digest([(str(file.relative_to(folder)), file) for file in files])


def _digest(files: Sequence[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, file in files:
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        for block in _sample(file):
            digest.update(block)
    return digest.hexdigest()[:16]


def _sample(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE_FILE:
            yield stream.read()
            return
        for i in range(BLOCKS):
            stream.seek(i * (size - BLOCK) // (BLOCKS - 1))
            yield stream.read(BLOCK)
