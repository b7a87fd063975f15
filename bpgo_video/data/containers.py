"""Video files opened for decoding: by their first bytes, from this machine alone, and within limits.

ffmpeg would guess a file's format, and some formats name other files or addresses that it then opens: playlists,
session descriptions, lists of images. So the format is fixed before ffmpeg reads the file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av

from bpgo_video.errors import InputError

MAX_PIXELS = 2**26  # of an image or a frame, as many as 8192 x 8192
MAX_FRAMES = 10**6  # that are decoded of a video
MAX_HELD = 2**32  # pixels of a video that is read whole: 12 GiB of bytes
SIGNATURES = {  # ffmpeg's format -> place and forms of the bytes by which a file is of that format
    "mov": (4, (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")),  # mp4 and m4v as well
    "matroska": (0, (b"\x1aE\xdf\xa3",)),  # webm as well
    "avi": (8, (b"AVI ",)),
}


class VideoError(InputError):
    """A video that cannot be read, written or cut; the message names it."""


@contextmanager
def opened(source: str | bytes, owner: str) -> Iterator[Any]:
    """A container with a video stream, open inside the block. Any ffmpeg error in the block becomes a VideoError.

    Args:
        source: a path, or a file's content.
        owner: the file's name in errors.
    """
    file = f"file:{source}" if isinstance(source, str) else io.BytesIO(source)
    try:
        form = container_format(source, owner)
        with av.open(file, format=form, options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise VideoError(f"{owner} holds no video stream; is it complete?")
            if (codec := container.streams.video[0].codec_context) is None:
                raise VideoError(f"{owner} cannot be decoded: its codec is unknown; is it complete?")
            check_pixels(codec.width, codec.height, owner)
            codec.options = {"max_pixels": str(MAX_PIXELS)}  # the stream may be larger than the header states
            yield container
    except av.error.FFmpegError as error:
        raise VideoError(f"{owner} cannot be decoded: {error.strerror}; is it complete?") from error


def container_format(source: str | bytes, owner: str) -> str:
    """A key of SIGNATURES. Raises VideoError if the file has none of their signatures."""
    if isinstance(source, bytes):
        start = source[:12]
    elif Path(source).is_file():
        with open(source, "rb") as file:
            start = file.read(12)
    else:
        raise VideoError(f"the video {owner} does not exist, or is not a file")
    for name, (place, forms) in SIGNATURES.items():
        if start[place:].startswith(forms):
            return name
    raise VideoError(
        f"{owner} is not an mp4, mov, mkv, webm or avi file by its first bytes; is it complete? `ffmpeg -i IN OUT.mp4` "
        "converts others"
    )


def check_pixels(width: int, height: int, owner: str) -> None:
    """Raise VideoError if a frame is too large to be decoded."""
    if width * height > MAX_PIXELS:
        raise VideoError(
            f"{owner} is {width} x {height}, {width * height:,} pixels a frame; at most {MAX_PIXELS:,} are read: scale "
            "it down with `ffmpeg -i IN -vf scale=1920:-2 OUT.mp4`"
        )


def decoded(container: Any, owner: str, held: bool = False) -> Iterator[av.VideoFrame]:
    """The frames of a container.

    Args:
        held: whether the caller keeps them all.

    Raises:
        VideoError: there are too many.
    """
    pixels = 0
    for count, frame in enumerate(container.decode(video=0), start=1):
        pixels += frame.width * frame.height
        if count > MAX_FRAMES or (held and pixels > MAX_HELD):
            limit = f"{MAX_FRAMES:,} frames" if count > MAX_FRAMES else f"{MAX_HELD:,} pixels are held at once"
            raise VideoError(
                f"{owner} has {count:,} frames or more of {frame.width} x {frame.height}; at most {limit}: cut it with "
                "`ffmpeg -t SECONDS -i IN OUT.mp4`, or scale it down"
            )
        yield frame
