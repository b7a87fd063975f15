"""Files and folders: written whole or not at all; models by name, and hashes of their content.

What must be complete is written under another name, flushed to disk, then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

PACKAGE_PREFIX = "package:"
WHOLE_FILE = 2**20  # bytes; larger files are sampled for a fingerprint
BLOCKS, BLOCK = 256, 4096
SHARD_CACHE = "~/.cache/bpgo_video/shards"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block ends without an error, it is renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"  # process ids repeat on other hosts
    try:
        yield aside
        flush(aside)
        os.replace(aside, path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to `path`. It is renamed to `path` when the block ends without an error, else deleted.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; name another output, or delete it first")
    aside = path.with_name(f"partial-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically. Raises ValueError for infinities and NaN, which are not JSON."""
    with atomic_file(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with default permissions; the library would make it readable by its owner only."""
    from safetensors.torch import save_file  # imports torch, and --help imports this file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


def flush(path: Path) -> None:
    """Write a file or folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resolve_folder(name: str, only: Sequence[str] | None = None) -> Path:
    """The local folder of a model.

    Args:
        name: a path; `package:some.package/sub/folder` for data of an installed package; or a hub id
            (`Wan-AI/Wan2.1-T2V-1.3B-Diffusers`), which is downloaded once into the hub's cache.
        only: patterns of the files to download (`*.json`); None downloads all.

    Raises:
        FileNotFoundError: no such folder or package data, and no hub id or a failed download.
    """
    if name.startswith(PACKAGE_PREFIX):
        package, _, rest = name.removeprefix(PACKAGE_PREFIX).partition("/")
        try:
            folder = Path(str(files(package))) / rest
        except ModuleNotFoundError:
            folder = Path(name)  # does not exist
    else:
        folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return folder
    except OSError as error:  # a name that is too long
        raise FileNotFoundError(f"model folder {name[:60]!r}... is no path: {error.strerror}") from error
    if name.count("/") != 1 or name.startswith((PACKAGE_PREFIX, ".", "/", "~")):
        looked = "" if str(folder) == name else f" (looked at {folder})"
        raise FileNotFoundError(
            f"model folder {name!r} does not exist{looked}; give a local folder, a hub id "
            f"like 'owner/name', or '{PACKAGE_PREFIX}module/folder'"
        )
    from huggingface_hub import snapshot_download  # slow, and only hub ids need it

    try:
        return Path(snapshot_download(name, allow_patterns=None if only is None else list(only)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name!r} is no local folder, and its download failed: {error}") from error


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
