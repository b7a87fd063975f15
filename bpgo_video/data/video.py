"""How do videos enter and leave? H.264 files, written by PyAV; read by decord, or PyAV where that is missing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bpgo_video.atomic import atomic_file

# Below 720 lines players decode untagged video by BT.601, which is also what swscale converts with: said aloud here.
COLOUR_TAGS = "colorprim=smpte170m:transfer=smpte170m:colormatrix=smpte170m"


class VideoError(ValueError):
    """A video that cannot be written or read."""


def write_video(
    path: Path | str, video: Float[Tensor, "frames 3 height width"], fps: float | int, crf: int = 17
) -> None:
    """Write H.264 (yuv420p, mp4) whose frames last exactly 1 / fps; the file appears complete or not at all.

    Args:
        video: in [0, 1]; height and width are even, which 4:2:0 needs.
        fps: frames a second; 29.97 and the like become the nearest fraction over at most 1001.
        crf: x264's constant rate factor, 0 (lossless luma) to 51.

    Raises:
        VideoError: another shape, or values outside [0, 1].
    """
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape or video.shape[2] % 2 or video.shape[3] % 2:
        raise VideoError(
            f"{path}: the video is {tuple(video.shape)}; it must be (frames, 3, height, width) with even sizes"
        )
    if not (video.min() >= 0 and video.max() <= 1):
        raise VideoError(f"{path}: values span {video.min():.4g} to {video.max():.4g}; they must be in [0, 1]")
    pixels = as_bytes(video)
    rate = Fraction(fps).limit_denominator(1001)
    with atomic_file(Path(path)) as aside, av.open(str(aside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "x264-params": COLOUR_TAGS})
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        stream.time_base = 1 / rate
        for number, image in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def as_bytes(video: Float[Tensor, "frames 3 height width"]) -> UInt8[np.ndarray, "frames height width 3"]:
    """A video in [0, 1] as files and libraries for pictures want it."""
    return (video.detach().float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def read_video(path: Path | str) -> tuple[Float[Tensor, "frames 3 height width"], float]:
    """Every frame of a video in [0, 1], and its mean frames a second. Both readers give the same bits.

    Frames are turned upright by the file's rotation. Where they last unequally long (variable frame rate), each is
    still given once, in order.

    Raises:
        VideoError: the file is missing or cut off, or neither reader can decode it.
    """
    pixels, fps = read_pixels(path)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, fps


def read_pixels(path: Path | str) -> tuple[UInt8[np.ndarray, "frames height width 3"], float]:
    """The same, in the bytes that the file holds. Raises VideoError as `read_video` does."""
    if not Path(path).is_file():
        raise VideoError(f"the video {path} does not exist")
    check_end(str(path), str(path))
    try:
        import decord  # has no wheels for some platforms
    except ImportError:
        return read_pyav(path)
    try:
        return read_decord(path)
    except (decord.DECORDError, RuntimeError):  # the latter when it cannot open the file
        return read_pyav(path)


def read_decord(path: Path | str) -> tuple[np.ndarray, float]:
    """(frames, height, width, 3) uint8 and frames a second."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy(), float(reader.get_avg_fps())


def read_pyav(path: Path | str) -> tuple[np.ndarray, float]:
    """(frames, height, width, 3) uint8 and frames a second."""
    with opened(str(path), str(path)) as container:
        rate = container.streams.video[0].average_rate
        frames = [upright(frame, path) for frame in container.decode(video=0)]
    if not frames or not rate:
        raise VideoError(f"{path} holds no frames")
    return np.stack(frames), float(rate)


@dataclass(frozen=True)
class VideoHeader:
    """What a file says of its video, without a frame being decoded.

    Attributes:
        fps: mean frames a second.
        frames: how many there are; 0 where the file does not say.
        codec, pixel_format: by ffmpeg's names, h264 and yuv420p for example.
    """

    fps: float
    frames: int
    height: int
    width: int
    codec: str
    pixel_format: str


def read_header(path: Path | str) -> VideoHeader:
    """
    Raises:
        VideoError: the file is no video, or lacks what players need first, as an mp4 that was cut off does.
    """
    with opened(str(path), str(path)) as container:
        stream = container.streams.video[0]
        if not stream.average_rate:
            raise VideoError(f"{path} holds no frames")
        codec = stream.codec_context
        return VideoHeader(
            float(stream.average_rate), stream.frames, codec.height, codec.width, codec.name, str(codec.pix_fmt)
        )


def check_video(source: str | bytes, owner: str) -> int:
    """Decode every frame of a path or of a file's bytes, one in memory at a time; how many there are.

    Raises:
        VideoError: that fails, there is no frame, or the file is cut off.
    """
    check_end(source, owner)
    with opened(source, owner) as container:
        count = sum(1 for _ in container.decode(video=0))
    if not count:
        raise VideoError(f"{owner} holds no frames")
    return count


def check_end(source: str | bytes, owner: str) -> None:
    """VideoError where a Matroska file (mkv, webm) is shorter than it says: cut off, it ends without another error."""
    with opened(source, owner) as container:
        stream = container.streams.video[0]
        tag = stream.metadata.get("DURATION")  # HH:MM:SS.nnn
        if "matroska" not in container.format.name or tag is None:
            return
        times = sorted(
            float(packet.pts * packet.time_base) for packet in container.demux(stream) if packet.pts is not None
        )
    promised = sum(float(part) * unit for part, unit in zip(tag.split(":"), (3600, 60, 1), strict=True))
    longest = max(np.diff(times), default=promised)  # of the frames; one that is alone may last as long as the file
    if not times or times[-1] + 2 * longest < promised:
        raise VideoError(f"{owner} ends after {max(times, default=0):.2f} of {promised:.2f} seconds; is it complete?")


def upright(frame: av.VideoFrame, path: Path | str) -> np.ndarray:
    """(height, width, 3) uint8, turned by the file's rotation. Raises VideoError where that is no quarter turn."""
    if frame.rotation % 90:
        raise VideoError(f"{path} is turned by {frame.rotation} degrees; only quarter turns are read")
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


@contextmanager
def opened(source: str | bytes, owner: str) -> Iterator[Any]:
    """A container with a video stream, open inside the block; what goes wrong in it becomes a VideoError."""
    try:
        with av.open(source if isinstance(source, str) else io.BytesIO(source)) as container:
            if not container.streams.video:
                raise VideoError(f"{owner} holds no video stream; is it complete?")
            yield container
    except av.error.FFmpegError as error:
        raise VideoError(f"{owner} cannot be decoded: {error}; is it complete?") from error
