"""Contact sheets: frames of videos in rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bpgo_video.data.media import as_bytes

STRIP_FRAMES = 5  # evenly spaced in videos of 4n + 1 frames
STRIP_HEIGHT = 160  # pixels; larger frames are scaled down
GREY = (127, 127, 127)


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
