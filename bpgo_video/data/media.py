"""Is an image or video file usable? Read as it is, decoded to find out, and kept as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from bpgo_video.data.images import decode_image, image_extension
from bpgo_video.data.prompt_records import MEDIA, Media
from bpgo_video.data.video import VideoError, check_video


def read_media(kind: str, path: Path) -> Media:
    """The bytes of a file, and what they are.

    Raises:
        ImageError, VideoError: the file does not decode, or is of a kind that shards do not hold.
    """
    data = path.read_bytes()
    CHECKS[kind](data, str(path))
    return Media(EXTENSIONS[kind](data, path), data)


def check_media(media: Mapping[str, Media], owner: str) -> None:
    """Decode every file of a record. Raises ImageError or VideoError, naming `owner`."""
    for kind, file in media.items():
        CHECKS[kind](file.data, owner)


def _video_extension(data: bytes, path: Path) -> str:
    extension = path.suffix.removeprefix(".").lower()
    if extension not in MEDIA["video"]:
        raise VideoError(f"{path}: reference videos are {', '.join(MEDIA['video'])} files")
    return extension


CHECKS: Mapping[str, Callable[[bytes, str], object]] = MappingProxyType({"image": decode_image, "video": check_video})
EXTENSIONS: Mapping[str, Callable[[bytes, Path], str]] = MappingProxyType(
    {"image": lambda data, path: image_extension(data, str(path)), "video": _video_extension}
)
