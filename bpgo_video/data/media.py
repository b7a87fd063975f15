"""Images and videos: files in, RGB tensors in [0, 1] out; H.264 files and contact sheets back.

Pillow and PyAV do the decoding.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from bpgo_video.data.containers import MAX_PIXELS, VideoError, decoded, opened
from bpgo_video.errors import InputError
from bpgo_video.files import atomic_file
from bpgo_video.types import Audio

IMAGE_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # by Pillow's name of the format
MEDIA = {"image": tuple(IMAGE_EXTENSIONS.values()), "video": ("mp4", "mkv", "mov", "webm")}  # what shards store
BITS = 192_000  # of sound, a second
STRIP_FRAMES = 5  # evenly spaced in videos of 4n + 1 frames
STRIP_HEIGHT = 160  # pixels; larger frames are scaled down
GREY = (127, 127, 127)
Size = tuple[int, int]  # height, width
MAX_ASPECT = 16  # a video shows a sliver of longer images, and resizing one to cover it takes gigabytes
# Players decode untagged video of fewer than 720 lines by BT.601, and swscale converts with it too. The tags say so.
COLOUR_TAGS = "colorprim=smpte170m:transfer=smpte170m:colormatrix=smpte170m"


class ImageError(InputError):
    """An image that cannot be used; the message names it."""


class Media(NamedTuple):
    """An unchanged image or video file: its extension without the dot, and its bytes."""

    extension: str
    data: bytes


def read_media(kind: str, source: Path | bytes) -> Media:
    """Read a file of a kind in MEDIA and check that it decodes. Images get the extension of their content.

    Args:
        source: a path, or the file's content.

    Raises:
        ImageError, VideoError: the file does not decode, or shards do not store its format.
    """
    owner = str(source) if isinstance(source, Path) else f"the {kind}"
    data = source.read_bytes() if isinstance(source, Path) else source
    check_media(kind, data, owner)
    extension = image_extension(data, owner) if kind == "image" else Path(owner).suffix.removeprefix(".").lower()
    if extension not in MEDIA[kind]:
        raise VideoError(f"{owner}: reference videos are {', '.join(MEDIA['video'])} files; convert it to one of them")
    return Media(extension, data)


def check_media(kind: str, data: bytes, owner: str) -> None:
    """Decode all of a file of a kind in MEDIA. Raises ImageError or VideoError, naming `owner`."""
    if kind == "image":
        decode_image(data, owner)
    else:
        check_video(data, owner)


def image_extension(data: bytes, owner: str) -> str:
    """png, jpg or webp, by the header. Raises ImageError for any other content."""
    with _open_image(data, owner) as image:
        return IMAGE_EXTENSIONS[str(image.format)]


def decode_image(data: bytes, owner: str) -> Float[Tensor, "3 height width"]:
    """RGB pixels in [0, 1], turned upright by the EXIF orientation.

    Transparency is composited on black. 16-bit grey keeps its 16 bits; Pillow reads the upper 8 of 16-bit colour.

    Args:
        owner: the image's name in errors.

    Raises:
        ImageError: the image does not decode, is animated, has sides that differ over 16-fold, or has a colour mode
            without a unique RGB meaning, such as CMYK.
    """
    with _open_image(data, owner) as image:
        if (count := getattr(image, "n_frames", 1)) > 1:
            raise ImageError(f"{owner}: the image has {count} frames; give a still image")
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ImageError(f"{owner}: the image is {image.width} x {image.height}; crop it to at most 16:1")
        if image.mode not in TO_PIXELS:
            raise ImageError(f"{owner}: the image has the colour mode {image.mode}; save it as RGB")
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise for damaged files
            raise ImageError(f"{owner}: the image does not decode: {error}") from error
        pixels = TO_PIXELS[image.mode](ImageOps.exif_transpose(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def fit_image(
    image: Float[Tensor, "3 source_height source_width"], height: int, width: int
) -> Float[Tensor, "3 height width"]:
    """Resize to cover height x width at the image's aspect ratio (antialiased bicubic), then crop the centre."""
    source_height, source_width = image.shape[1:]
    scale = max(height / source_height, width / source_width)
    size = max(height, round(source_height * scale)), max(width, round(source_width * scale))
    resized = interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, top : top + height, left : left + width]


def _open_image(data: bytes, owner: str) -> Image.Image:
    too_large = f"at most {MAX_PIXELS:,} pixels are read; scale the image down"
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(IMAGE_EXTENSIONS))
    except Image.DecompressionBombError as error:
        raise ImageError(f"{owner}: {error}; {too_large}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{owner}: the file is not a {', '.join(IMAGE_EXTENSIONS)} image: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{owner}: the image is {image.width} x {image.height}; {too_large}")
    return image


def _from_eight_bits(image: Image.Image) -> np.ndarray:
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    return rgba[..., :3] * rgba[..., 3:]


def _from_sixteen_bit_grey(image: Image.Image) -> np.ndarray:
    grey = np.asarray(image).astype(np.float32) / 65535
    return np.repeat(grey[..., None], 3, axis=2)


TO_PIXELS: Mapping[str, Callable[[Image.Image], np.ndarray]] = {  # by Pillow's colour mode
    **dict.fromkeys(("1", "L", "LA", "P", "PA", "RGB", "RGBA"), _from_eight_bits),
    "I;16": _from_sixteen_bit_grey,
}


def write_video(
    path: Path | str,
    video: Float[Tensor, "frames 3 height width"],
    fps: float | int,
    crf: int = 17,
    audio: Audio | None = None,
) -> None:
    """Write H.264 (yuv420p, mp4) with frames of exactly 1 / fps seconds. The file appears complete or not at all.

    Args:
        video: values in [0, 1]; height and width even, as 4:2:0 requires.
        fps: frames per second; 29.97 and the like become the nearest fraction with a denominator up to 1001.
        crf: x264's constant rate factor, 0 (lossless luma) to 51.
        audio: the video's sound, of one sample with one or two channels, written as AAC.

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
        sound = None
        if audio is not None:
            sound = container.add_stream("aac", rate=audio.sampling_rate)
            sound.bit_rate = BITS
            sound.layout = "mono" if audio.waveform.shape[1] == 1 else "stereo"
        for number, image in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None and sound is not None:
            _add_sound(container, sound, audio)


def _add_sound(container: Any, stream: Any, audio: Audio) -> None:
    samples = audio.waveform[0].detach().float().clamp(-1, 1).cpu().contiguous().numpy()
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=stream.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = audio.sampling_rate, 0, Fraction(1, audio.sampling_rate)
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def as_bytes(video: Float[Tensor, "frames 3 height width"]) -> UInt8[np.ndarray, "frames height width 3"]:
    """A video in [0, 1] as 8-bit pixels, channels last."""
    return (video.detach().float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def read_video(path: Path | str) -> tuple[Float[Tensor, "frames 3 height width"], float]:
    """Every frame of a video in [0, 1], and its mean frames per second.

    Frames are turned upright by the file's rotation. A variable frame rate still gives each frame once, in order.

    Raises:
        VideoError: the file is missing or cut off, or does not decode.
    """
    pixels, fps = read_pixels(path)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, fps


def read_pixels(path: Path | str) -> tuple[UInt8[np.ndarray, "frames height width 3"], float]:
    """The same as 8-bit pixels, channels last. Raises VideoError as `read_video`."""
    check_end(str(path), str(path))
    with opened(str(path), str(path)) as container:
        rate = container.streams.video[0].average_rate
        frames = [upright(frame, path) for frame in decoded(container, str(path), held=True)]
    if not frames or not rate:
        raise VideoError(f"{path} holds no frames")
    return np.stack(frames), float(rate)


@dataclass(frozen=True)
class VideoHeader:
    """What a file states about its video, read without decoding.

    Attributes:
        fps: mean frames per second.
        frames: number of frames; 0 if the file does not state it.
        codec, pixel_format: ffmpeg's names, such as h264 and yuv420p.
        seconds: duration; None if the file does not state it.
    """

    fps: float
    frames: int
    height: int
    width: int
    codec: str
    pixel_format: str
    seconds: float | None = None


def read_header(path: Path | str) -> VideoHeader:
    """The header of a video file.

    Raises:
        VideoError: the file is not a video, or has no index, as an mp4 that was cut off.
    """
    with opened(str(path), str(path)) as container:
        stream = container.streams.video[0]
        if not stream.average_rate:
            raise VideoError(f"{path} holds no frames")
        seconds = None
        if stream.duration is not None:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration is not None:
            seconds = container.duration / av.time_base
        codec, fps = stream.codec_context, float(stream.average_rate)
        return VideoHeader(fps, stream.frames, codec.height, codec.width, codec.name, str(codec.pix_fmt), seconds)


def check_video(source: str | bytes, owner: str) -> int:
    """Decode every frame of a path or of a file's bytes, one in memory at a time.

    Returns:
        The number of frames.

    Raises:
        VideoError: decoding fails, there is no frame, or the file is cut off.
    """
    check_end(source, owner)
    with opened(source, owner) as container:
        count = sum(1 for _ in decoded(container, owner))
    if not count:
        raise VideoError(f"{owner} holds no frames")
    return count


def check_end(source: str | bytes, owner: str) -> None:
    """Raise VideoError if a Matroska file (mkv, webm) is cut off. Decoding one would end without an error."""
    with opened(source, owner) as container:
        stream = container.streams.video[0]
        tag = stream.metadata.get("DURATION")  # HH:MM:SS.nnn
        if "matroska" not in container.format.name or tag is None:
            return
        packets = (packet for packet in container.demux(stream) if packet.pts is not None)
        times = sorted(float(packet.pts * packet.time_base) for packet in packets)
    stated = sum(float(part) * unit for part, unit in zip(tag.split(":"), (3600, 60, 1), strict=True))
    longest = max(np.diff(times), default=stated)  # frame; a single one may last as long as the file
    if not times or times[-1] + 2 * longest < stated:
        raise VideoError(f"{owner} ends after {max(times, default=0):.2f} of {stated:.2f} seconds; is it complete?")


def upright(frame: av.VideoFrame, path: Path | str) -> np.ndarray:
    """(height, width, 3) uint8, turned by the file's rotation. Raises VideoError if that is not a quarter turn."""
    if frame.rotation % 90:
        raise VideoError(f"{path} is rotated by {frame.rotation} degrees; only quarter turns are read")
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def strip(video: Float[Tensor, "frames 3 height width"]) -> Image.Image:
    """STRIP_FRAMES evenly spaced frames of a video in [0, 1] in a row, at most STRIP_HEIGHT high."""
    count, _, height, width = video.shape
    rows = torch.linspace(0, count - 1, min(count, STRIP_FRAMES)).round().long()
    scale = min(1.0, STRIP_HEIGHT / height)
    size = (round(width * scale), round(height * scale))
    frames = [Image.fromarray(frame) for frame in as_bytes(video[rows].clamp(0, 1))]
    return joined([frame.resize(size, Image.Resampling.LANCZOS) for frame in frames])


def joined(images: Sequence[Image.Image], below: bool = False) -> Image.Image:
    """Images of one size in a row, or below each other, with grey between."""
    (width, height), steps = images[0].size, len(images) - 1
    gap = max(1, height // 32)
    right, down = (0, height + gap) if below else (width + gap, 0)
    sheet = Image.new("RGB", (width + steps * right, height + steps * down), GREY)
    for i, image in enumerate(images):
        sheet.paste(image, (i * right, i * down))
    return sheet
