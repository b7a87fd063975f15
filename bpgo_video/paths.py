"""Where does a folder named in a config lie? On disk, inside an installed package, or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

PACKAGE_PREFIX = "package:"
SHARD_CACHE = "~/.cache/bpgo_video/shards"


def resolve_folder(name: str, only: Sequence[str] | None = None) -> Path:
    """The local folder behind `name`.

    Args:
        name: a path; `package:some.package/sub/folder` for data that an installed package carries; or a hub id
            (`Wan-AI/Wan2.1-T2V-1.3B-Diffusers`), which is downloaded once into the hub's own cache.
        only: patterns of the files that are needed (`*.json`), so that a download takes no others.

    Raises:
        FileNotFoundError: neither a folder, nor package data, nor a name of the hub's form.
    """
    if name.startswith(PACKAGE_PREFIX):
        package, _, rest = name.removeprefix(PACKAGE_PREFIX).partition("/")
        folder = Path(str(files(package))) / rest
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
    from huggingface_hub import snapshot_download  # network code is loaded only when a hub id is asked for

    try:
        return Path(snapshot_download(name, allow_patterns=None if only is None else list(only)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name!r} is no local folder, and the hub did not give it either: {error}") from error
