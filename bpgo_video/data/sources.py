"""Where do shards lie? In a local folder, or behind URLs: then each file is copied once and compared with its hash.

    runs/prompts                                             a local folder: all of its shards
    runs/prompts/prompts-00000[0-3].tar                      a glob: these shards of the folder
    runs/prompts/prompts-{000000..000003}.tar                a brace range
    https://host/prompts                                     a folder that holds index.json
    https://host/prompts/prompts-{000000..000003}.tar        these shards of it
    s3://bucket/prompts                                      through `aws s3 cp`
    pipe:ssh host cat prompts/prompts-{000000..000003}.tar   any command; its other files are asked for by replacing the
                                                             shard's name

URLs are opened by webdataset's gopen, which also knows gs://, hf:// and others.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import webdataset
from braceexpand import braceexpand
from filelock import FileLock
from tqdm import tqdm

from bpgo_video.atomic import atomic_file
from bpgo_video.data.prompt_records import ShardError
from bpgo_video.data.shard_writing import NEGATIVE, file_sha256
from bpgo_video.paths import SHARD_CACHE

REMOTE = re.compile(r"pipe:|[a-z0-9]+://")
SHARD = re.compile(r"(?:prompts|clips)-[^/\s]*\.tar")


@dataclass(frozen=True)
class Source:
    """A folder on this machine, and which of its shards are meant: None stands for all."""

    folder: Path
    names: tuple[str, ...] | None = None


def local_source(source: str, cache: Path | str = SHARD_CACHE) -> Source:
    """Bring shards to this machine, where they are not here already.

    Args:
        cache: folder for copies. A copy lies under the hash of its index: a changed original makes a new one. Ranks
            that share a cache take turns, and the first one copies.

    Raises:
        ShardError: a pattern that nothing matches, a URL that cannot be read, a file that does not match its hash, or
            a cache that cannot be written.
    """
    if REMOTE.match(source):
        return _copy(source, Path(cache))
    path = Path(source)
    if path.is_dir() or not SHARD.fullmatch(path.name):
        return Source(path)
    found = sorted({Path(name) for pattern in _expanded(source) for name in glob(pattern)})
    missing = [name for name in _expanded(source) if not glob(name)]
    if missing or len({shard.parent for shard in found}) != 1:
        raise ShardError(f"{source} must name shards of one folder; nothing is at {', '.join(missing) or 'it'}")
    return Source(found[0].parent, tuple(shard.name for shard in found))


def _copy(source: str, cache: Path) -> Source:
    urls = _expanded(source)
    names = [match[0] for url in urls if (match := SHARD.search(url))]
    if names and len(names) != len(urls):
        raise ShardError(f"{source} must name one folder, or shards (prompts-*.tar, clips-*.tar) of one")
    if "*" in source and not source.startswith("pipe:"):
        raise ShardError(f"{source}: a URL cannot be searched; name a folder, or a range such as {{000000..000009}}")
    index = _read(_url(urls[0], "index.json"))
    lock = _lock_in(cache, hashlib.sha256(index).hexdigest()[:16])
    with FileLock(lock):
        _copy_files(urls[0], lock.parent, index, names)
    return Source(lock.parent, tuple(names) or None)


def _lock_in(cache: Path, name: str) -> Path:
    """The file that ranks take turns by, in a folder of the cache."""
    try:
        lock = cache.expanduser() / name / ".lock"  # RuntimeError: neither HOME nor this user's name leads to a home
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except (OSError, RuntimeError) as error:
        raise ShardError(f"data.cache {cache} cannot hold copies of shards ({error}); name another folder") from error
    return lock


def _copy_files(url: str, folder: Path, index: bytes, names: Sequence[str]) -> None:
    try:
        content = json.loads(index)
        hashes = {shard["name"]: shard["sha256"] for shard in content["shards"]}
        negative = content["negative_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{_url(url, 'index.json')} is no index of prompt shards ({error!r})") from error
    unknown = [name for name in (*names, *hashes) if name not in hashes or not SHARD.fullmatch(name)]
    if unknown:
        raise ShardError(f"{_url(url, 'index.json')} has no shard {', '.join(unknown)}; it has {', '.join(hashes)}")
    wanted = {NEGATIVE: negative, **{name: hashes[name] for name in names or hashes}}
    todo = [name for name in wanted if not (folder / name).is_file()]
    for name in tqdm(todo, desc="Copying shards", unit="file", disable=None):  # None: no bar in a log file
        _fetch(_url(url, name), folder / name, wanted[name])
    if not (folder / "index.json").is_file():
        with atomic_file(folder / "index.json") as aside:
            aside.write_bytes(index)


def _expanded(source: str) -> list[str]:
    try:
        return list(braceexpand(source))
    except ValueError as error:
        raise ShardError(f"{source}: its braces do not match") from error


def _url(shard_or_folder: str, name: str) -> str:
    """Where a file lies that is beside a shard, or in a folder."""
    if SHARD.search(shard_or_folder):
        return SHARD.sub(name, shard_or_folder)
    return f"{shard_or_folder.rstrip('/')}/{name}"


def _open(url: str):
    return webdataset.gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url)


def _read(url: str) -> bytes:
    try:
        with _open(url) as stream:
            return stream.read()
    except (OSError, ValueError) as error:
        raise ShardError(f"{url} cannot be read: {error}") from error


def _fetch(url: str, path: Path, sha256: str) -> None:
    try:
        with atomic_file(path) as aside:
            with _open(url) as stream, aside.open("wb") as copy:
                shutil.copyfileobj(stream, copy, 2**20)
            if (found := file_sha256(aside)) != sha256:
                raise ShardError(f"{url} has the sha256 {found}, the index states {sha256}: one is damaged or old")
    except OSError as error:
        raise ShardError(f"{url} cannot be read: {error}") from error
