"""How does VBench make a network's input of a frame? As its transforms do: most of them resize without antialiasing.

torchvision's operations, which VBench calls, are written out in torch and Pillow: torchvision is no dependency. Rewards
have another preprocessing (rewards/preprocessing.py: antialiased, differentiable); scores of the two differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

Frames = UInt8[Tensor, "frames 3 height width"]
Inputs = Float[Tensor, "frames 3 rows columns"]

Channels = tuple[float, float, float]

AT_ONCE = 32  # frames that are resized and encoded together
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preparation:
    """Resized, cut, scaled to [0, 1], normalised.

    Attributes:
        mean, std: of the normalisation, per channel.
        edge: pixels of the shorter side; None keeps the size.
        square: both sides become `edge`, whatever the aspect ratio.
        crop: pixels of a square that is cut out of the middle; None cuts nothing.
        antialias: of frames; single pictures go through Pillow, which always does.
        rounded: frames are rounded to bytes after resizing, and cubic overshoot is cut off; else neither.
    """

    edge: int | None = None
    square: bool = False
    crop: int | None = None
    mode: str = "bilinear"
    antialias: bool = False
    rounded: bool = False
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)

    def frames(self, frames: Frames) -> Inputs:
        resized = frames.float()
        size = self.size_of(*frames.shape[-2:])
        if size != tuple(frames.shape[-2:]):
            resized = interpolate(resized, size, mode=self.mode, align_corners=False, antialias=self.antialias)
            resized = resized.clamp(0, 255).round() if self.rounded else resized
        return self._normalised(self._cut(resized))

    def picture(self, image: Image.Image) -> Inputs:
        """A single one, as VBench prepares what Pillow opened."""
        height, width = self.size_of(image.height, image.width)
        resized = image.convert("RGB").resize((width, height), FILTERS[self.mode])
        return self._normalised(self._cut(torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float()))

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """After resizing; the longer side is cut to whole pixels."""
        if self.edge is None:
            return height, width
        if self.square:
            return self.edge, self.edge
        longer = int(self.edge * max(height, width) / min(height, width))
        return (self.edge, longer) if height <= width else (longer, self.edge)

    def _cut(self, images: Inputs) -> Float[Tensor, "frames 3 cut_rows cut_columns"]:
        if self.crop is None:
            return images
        top, left = (round((side - self.crop) / 2) for side in images.shape[-2:])
        return images[..., top : top + self.crop, left : left + self.crop]

    def _normalised(self, images: Inputs) -> Inputs:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images / 255 - mean) / std


IMAGENET = Preparation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OPENAI = Preparation(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
DINO = replace(IMAGENET, edge=224)
CLIP = replace(OPENAI, edge=224, crop=224, mode="bicubic")
VICLIP = replace(CLIP, rounded=True)
DINO_OF_IMAGES = replace(IMAGENET, edge=256, crop=224, mode="bicubic", antialias=True)
DREAMSIM = Preparation(edge=224, square=True, mode="bicubic", antialias=True)
UNCHANGED = Preparation()


@dataclass(frozen=True)
class Encoder:
    """Features of frames: a network behind VBench's preparation.

    Attributes:
        network: prepared frames on the device -> features, (frames, dim).
    """

    network: Callable[[Inputs], Float[Tensor, "frames dim"]]
    preparation: Preparation
    device: torch.device

    @torch.no_grad()
    def frames(self, frames: Frames) -> Float[Tensor, "frames dim"]:
        parts = [self.network(self.preparation.frames(part).to(self.device)) for part in frames.split(AT_ONCE)]
        return torch.cat([part.float().cpu() for part in parts])

    @torch.no_grad()
    def picture(self, image: Image.Image) -> Float[Tensor, "one dim"]:
        return self.network(self.preparation.picture(image).to(self.device)).float().cpu()


def fitted(frames: Frames, longer: int) -> Inputs:
    """In [0, 1], the longer side at most so many pixels (bilinear, not antialiased)."""
    height, width = frames.shape[-2:]
    images = frames.float()
    if max(height, width) > longer:
        scale = float(longer) / max(height, width)
        images = interpolate(images, (int(scale * height), int(scale * width)), mode="bilinear", align_corners=False)
    return images / 255


def replicated(images: Any, divisor: int) -> tuple[Any, tuple[int, int, int, int]]:
    """Edges repeated around the middle until both sides divide, as RAFT and AMT pad; and by how much, from the left."""
    height, width = (-side % divisor for side in images.shape[-2:])
    edges = (width // 2, width - width // 2, height // 2, height - height // 2)
    return torch.nn.functional.pad(images, edges, mode="replicate"), edges
