"""Where shards come from: a local folder, or a URL, from which each file is copied once and checked against its hash.

    runs/prompts                                             a local folder: all of its shards
    runs/prompts/prompts-00000[0-3].tar                      a glob: these shards of the folder
    runs/prompts/prompts-{000000..000003}.tar                a brace range
    https://host/prompts                                     a folder that holds index.json
    https://host/prompts/prompts-{000000..000003}.tar        these shards of it
    s3://bucket/prompts                                      through `aws s3 cp`
    pipe:ssh host cat prompts/prompts-{000000..000003}.tar   any command; other file names replace the shard's name

webdataset's gopen opens URLs; it also supports gs://, hf:// and others.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from glob import glob
from pathlib import Path

import webdataset
from braceexpand import braceexpand
from filelock import FileLock
from tqdm import tqdm

from bpgo_video.atomic import atomic_file
from bpgo_video.data.records import ShardError
from bpgo_video.data.writer import NEGATIVE, file_sha256

REMOTE = re.compile(r"pipe:|[a-z0-9]+://")
SHARD = re.compile(r"(?:prompts|clips)-[^/\s]*\.tar")


def local_shards(source: str, cache: Path) -> tuple[Path, list[str]]:
    """Copy remote shards to this machine unless they are here already.

    Args:
        cache: folder for copies. A copy is named after the hash of its index, so a changed original gets a new copy.
            Ranks that share a cache take turns; the first one copies.

    Returns:
        The local folder, and the names of the selected shards; none selects all.

    Raises:
        ShardError: a pattern matches nothing, a URL cannot be read, a file does not match its hash, or the cache cannot
            be written.
    """
    path = Path(source)
    if not REMOTE.match(source) and (path.is_dir() or not SHARD.fullmatch(path.name)):
        return path, []
    try:
        names = list(braceexpand(source))
    except ValueError as error:
        raise ShardError(f"{source}: the braces do not match") from error
    if REMOTE.match(source):
        return _copy_missing(source, names, cache)
    missing = [name for name in names if not glob(name)]
    found = sorted({Path(match) for name in names for match in glob(name)})
    if missing or len({shard.parent for shard in found}) != 1:
        raise ShardError(f"{source} must name shards of one folder; nothing is at {', '.join(missing) or source}")
    return found[0].parent, [shard.name for shard in found]


def _copy_missing(source: str, urls: list[str], cache: Path) -> tuple[Path, list[str]]:
    selected = [match[0] for url in urls if (match := SHARD.search(url))]
    if selected and len(selected) != len(urls):
        raise ShardError(f"{source} must name one folder, or shards (prompts-*.tar, clips-*.tar) of one")
    if "*" in source and not source.startswith("pipe:"):
        raise ShardError(f"{source}: a URL cannot be searched; name a folder, or a range such as {{000000..000009}}")
    index_url = _url(urls[0], "index.json")
    try:
        with _open(index_url) as stream:
            index = stream.read()
    except (OSError, ValueError) as error:
        raise ShardError(f"{index_url} cannot be read: {error}") from error
    hashes = _hashes(index, index_url, selected)
    try:
        folder = cache.expanduser() / hashlib.sha256(index).hexdigest()[:16]  # RuntimeError: no home folder is known
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except (OSError, RuntimeError) as error:
        raise ShardError(f"data.cache {cache} cannot hold copies of shards ({error}); name another folder") from error
    with FileLock(folder / ".lock"):
        missing = [name for name in hashes if not (folder / name).is_file()]
        for name in tqdm(missing, desc="Copying shards", unit="file", disable=None):  # None: no bar in a log file
            _fetch(_url(urls[0], name), folder / name, hashes[name])
        if not (folder / "index.json").is_file():
            with atomic_file(folder / "index.json") as aside:
                aside.write_bytes(index)
    return folder, selected


def _hashes(index: bytes, url: str, selected: list[str]) -> dict[str, str]:
    """The sha256 of every file to copy, by name."""
    try:
        content = json.loads(index)
        shards = {shard["name"]: shard["sha256"] for shard in content["shards"]}
        negative = content["negative_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{url} is not an index of prompt shards ({error!r})") from error
    if unknown := [name for name in (*selected, *shards) if name not in shards or not SHARD.fullmatch(name)]:
        raise ShardError(f"{url} has no shard {', '.join(unknown)}; it has {', '.join(shards)}")
    return {NEGATIVE: negative, **{name: shards[name] for name in selected or shards}}


def _url(shard_or_folder: str, name: str) -> str:
    """The URL of a file next to a shard, or in a folder."""
    if SHARD.search(shard_or_folder):
        return SHARD.sub(name, shard_or_folder)
    return f"{shard_or_folder.rstrip('/')}/{name}"


def _open(url: str):
    return webdataset.gopen(f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url)


def _fetch(url: str, path: Path, sha256: str) -> None:
    try:
        with atomic_file(path) as aside:
            with _open(url) as stream, aside.open("wb") as copy:
                shutil.copyfileobj(stream, copy, 2**20)
            if (found := file_sha256(aside)) != sha256:
                raise ShardError(f"{url} has the sha256 {found}, the index states {sha256}: one is damaged or outdated")
    except OSError as error:
        raise ShardError(f"{url} cannot be read: {error}") from error
