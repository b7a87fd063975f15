"""Model folders by name: on disk, inside an installed package, or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

PACKAGE_PREFIX = "package:"
SHARD_CACHE = "~/.cache/bpgo_video/shards"


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
