"""What does a conditioning image look like as a tensor? Decoded to RGB in [0, 1], and fitted to the video's size."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

EXTENSIONS: Mapping[str, str] = MappingProxyType({"PNG": "png", "JPEG": "jpg", "WEBP": "webp"})  # of Pillow's formats
MAX_ASPECT = 16  # a video shows a sliver of longer images, and resizing one to cover it takes gigabytes


class ImageError(ValueError):
    """An image that cannot be used; the message names it."""


def image_extension(data: bytes, owner: str) -> str:
    """png, jpg or webp by what the bytes are, whatever their file was called; the pixels stay unread.

    Raises:
        ImageError: none of them.
    """
    with _opened(data, owner) as image:
        return EXTENSIONS[str(image.format)]


def decode_image(data: bytes, owner: str) -> Float[Tensor, "3 height width"]:
    """RGB pixels in [0, 1], upright by their EXIF orientation.

    Transparency is composited on black. 16-bit grey keeps its 16 bits; of 16-bit colour Pillow reads the upper 8.

    Args:
        owner: whose image it is, for messages.

    Raises:
        ImageError: it does not decode, moves, is longer than 16 times its other side, or has a colour mode without one
            meaning in RGB, such as CMYK.
    """
    with _opened(data, owner) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise ImageError(f"{owner}: the image has {frames} frames; give a still one")
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise ImageError(
                f"{owner}: the image is {image.width} x {image.height}; its sides differ over {MAX_ASPECT}-fold"
            )
        if image.mode not in PIXELS:
            raise ImageError(f"{owner}: the image has the colour mode {image.mode}; save it as RGB")
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise for damaged files
            raise ImageError(f"{owner}: the image does not decode: {error}") from error
        pixels = PIXELS[image.mode](ImageOps.exif_transpose(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def fit_image(
    image: Float[Tensor, "3 source_height source_width"], height: int, width: int
) -> Float[Tensor, "3 height width"]:
    """Resized to cover height x width at its own aspect ratio (antialiased bicubic), then cut out of the centre."""
    source_height, source_width = image.shape[1:]
    scale = max(height / source_height, width / source_width)
    size = max(height, round(source_height * scale)), max(width, round(source_width * scale))
    resized = interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, top : top + height, left : left + width]


def _opened(data: bytes, owner: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{owner}: this is no {', '.join(EXTENSIONS)} image: {error}") from error


def _eight_bit(image: Image.Image) -> np.ndarray:
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
    return rgba[..., :3] * rgba[..., 3:]


def _sixteen_bit_grey(image: Image.Image) -> np.ndarray:
    grey = np.asarray(image).astype(np.float32) / 65535
    return np.repeat(grey[..., None], 3, axis=2)


PIXELS: Mapping[str, Callable[[Image.Image], np.ndarray]] = MappingProxyType(
    dict.fromkeys(("1", "L", "LA", "P", "PA", "RGB", "RGBA"), _eight_bit) | {"I;16": _sixteen_bit_grey}
)
