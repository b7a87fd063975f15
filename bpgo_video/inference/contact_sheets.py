"""What does a video look like at a glance? Evenly spaced frames of it side by side, one video a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

STRIP_FRAMES = 5  # evenly spaced in videos of 4n + 1 frames
STRIP_HEIGHT = 160  # pixels; larger frames are scaled down
GREY = (127, 127, 127)


def strip(video: Float[Tensor, "frames 3 height width"]) -> Image.Image:
    """STRIP_FRAMES evenly spaced frames of a video in [0, 1], side by side, at most STRIP_HEIGHT high."""
    count, _, height, width = video.shape
    rows = torch.linspace(0, count - 1, min(count, STRIP_FRAMES)).round().long()
    pixels = (video[rows].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    scale = min(1.0, STRIP_HEIGHT / height)
    size = (round(width * scale), round(height * scale))
    gap = max(1, size[1] // 32)
    image = Image.new("RGB", ((size[0] + gap) * len(pixels) - gap, size[1]), GREY)
    for i, frame in enumerate(pixels):
        image.paste(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), (i * (size[0] + gap), 0))
    return image


def stacked(strips: Sequence[Image.Image]) -> Image.Image:
    """Strips of one size below each other."""
    width, height = strips[0].size
    gap = max(1, height // 32)
    sheet = Image.new("RGB", (width, (height + gap) * len(strips) - gap), GREY)
    for i, image in enumerate(strips):
        sheet.paste(image, (0, i * (height + gap)))
    return sheet
