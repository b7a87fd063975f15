"""Files and folders: written whole or not at all, and models by name.

What must be complete is written under another name, flushed to disk, then renamed.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

PACKAGE_PREFIX = "package:"
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
    if folder.is_dir():
        return folder
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
