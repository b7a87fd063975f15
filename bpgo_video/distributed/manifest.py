"""Which files a checkpoint consists of: written and hashed in one pass, listed in its manifest, checked before use.

    step-000050/manifest.json   step, ranks, ZeRO stage, dtype; bytes and XXH3 hash of every file; a hash of all this

The hash finds damage: flipped bits, lost writes, files of another step or rank. It does not find forgery, since whoever
can write the files can write the manifest; so nothing in a checkpoint may run code (`zero_files.py`). XXH3 hashes 11 GB
a second on one core, where SHA-256 hashes 1.4 (Intel Xeon, 2026-11-30).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
import xxhash

from bpgo_video.documents import SEAL, check_seal, plain_json, sealed
from bpgo_video.files import flush, save_tensors, write_json

VERSION = 4
MANIFEST = "manifest.json"
READ_AT_ONCE = 2**22  # bytes
THREADS = 8  # that hash files; hashing and reading do not hold Python's lock
DATA = {".pt", ".safetensors"}  # files that are read by their suffix, so that an extra one would be read too


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, of another layout, or not what it claims to be."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Layout:
    """What decides how a checkpoint can be read."""

    world_size: int
    zero_stage: int
    dtype: str


@dataclass(frozen=True)
class File:
    """A file of a checkpoint: its size, and the XXH3 hash of its content (128 bits, hex)."""

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        step: number of finished training steps.
        files: by path inside the checkpoint.
    """

    step: int
    layout: Layout
    files: Mapping[str, File]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


class HashedFile:
    """A file object for `torch.save`, inside its `with` block: a thread hashes what it writes."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash, self._bytes = path.open("wb", buffering=0), xxhash.xxh3_128(), 0
        self._thread = ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        hashed = self._thread.submit(self._hash.update, view)
        written = 0
        while written < len(view):  # an unbuffered file may take less at once
            written += self._file.write(view[written:])
        self._bytes += written
        hashed.result()  # the memory is torch's
        return written

    def flush(self) -> None:
        """Nothing is buffered."""

    def written(self) -> File:
        """The file's entry, once it is on the disk."""
        os.fsync(self._file.fileno())
        return File(self._bytes, self._hash.hexdigest())

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._thread.shutdown()


def _write_pickle(content: Any, path: Path) -> File:
    with HashedFile(path) as file:
        torch.save(content, cast(IO[bytes], file))
        return file.written()


def _write_tensors(content: tuple[Mapping[str, Any], Mapping[str, str]], path: Path) -> File:
    tensors, metadata = content
    save_tensors(tensors, path, metadata)
    return file_of(path)


WRITERS: Mapping[str, Callable[[Any, Path], File]] = {".pt": _write_pickle, ".safetensors": _write_tensors}


def write_file(content: Any, path: Path) -> File:
    """Write a file of a checkpoint through to the disk.

    Args:
        content: of a `.pt` file, any content of tensors and plain data; of a `.safetensors` file, (tensors, metadata).
    """
    return WRITERS[path.suffix](content, path)


def file_of(path: Path) -> File:
    """An existing file's entry; writes it through to the disk."""
    flush(path)
    return _hashed(path)


def _hashed(path: Path) -> File:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
            size += len(block)
    return File(size, digest.hexdigest())


def write_manifest(manifest: Manifest, folder: Path) -> None:
    write_json(folder / MANIFEST, sealed({"version": VERSION, **asdict(manifest)}))


def read_manifest(folder: Path) -> Manifest:
    """A checkpoint's manifest.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        content = plain_json(path.read_bytes(), path)
        check_seal(content, path)
        version = content.pop("version")
        del content[SEAL]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it is no complete checkpoint of this version of bpgo-video; name a complete "
            "RUN/checkpoints/step-XXXXXX"
        ) from None
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
    if version != VERSION:
        raise CheckpointError(f"{folder} has layout version {version}, this program reads {VERSION}")
    files = {name: File(**file) for name, file in content["files"].items()}
    return Manifest(content["step"], Layout(**content["layout"]), files)


def check_files(folder: Path, manifest: Manifest, names: Collection[str] | None = None) -> None:
    """Compare files with the manifest, several at once.

    Args:
        names: the files to read; None reads all.

    Raises:
        CheckpointError: a file is missing, changed, or does not belong; names it, and says whose it is, if that is
            known.
    """
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in DATA}
    if foreign := sorted(found - set(manifest.files)):
        raise CheckpointError(f"{folder / foreign[0]} is not among the files that {MANIFEST} lists; move it away")
    wanted = [(name, manifest.files[name]) for name in (manifest.files if names is None else names)]
    with ThreadPoolExecutor(THREADS) as pool:
        problems = list(pool.map(partial(_problem, folder), wanted))
    for problem in filter(None, problems):
        raise CheckpointError(problem)


def _problem(folder: Path, wanted: tuple[str, File]) -> str | None:
    name, expected = wanted
    path = folder / name
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"{path} has {size:,} bytes instead of the {expected.bytes:,} that were saved"
    found = _hashed(path)
    if found == expected:
        return None
    owners = [f"{other.parent.name}/{theirs}" for other, theirs in _elsewhere(folder, found)]
    return f"{path} is {'the file ' + owners[0] if owners else 'damaged: its content is not what was saved'}"


def _elsewhere(folder: Path, file: File) -> Iterator[tuple[Path, str]]:
    """Where the manifests of this run's checkpoints list a file."""
    for path in sorted(folder.parent.glob(f"step-*/{MANIFEST}")):
        try:
            files = read_manifest(path.parent).files
        except CheckpointError:
            continue
        yield from ((path, name) for name, one in files.items() if one == file)
