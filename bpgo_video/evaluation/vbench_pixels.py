"""VBench's preprocessing of frames, most of which resizes without antialiasing, and the networks behind it.

torchvision's operations, which VBench calls, are written out in torch and Pillow, so that torchvision is no dependency.
Rewards have their own preprocessing (antialiased, differentiable), so their scores differ from these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

Frames = UInt8[Tensor, "frames 3 height width"]
Inputs = Float[Tensor, "frames 3 rows columns"]
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Preparation:
    """Resize, crop, scale to [0, 1], normalise.

    Attributes:
        mean, std: of the normalisation, per channel.
        edge: pixels of the shorter side after resizing; None keeps the size.
        square: both sides become `edge`, whatever the aspect ratio.
        longest: larger frames shrink until their longer side has this many pixels.
        crop: pixels of a square cut out of the centre; None cuts nothing.
        antialias: for frames; single images go through Pillow, which always antialiases.
        rounded: frames are rounded to bytes after resizing and cubic overshoot is clipped; otherwise neither.
    """

    edge: int | None = None
    square: bool = False
    longest: int | None = None
    crop: int | None = None
    mode: str = "bilinear"
    antialias: bool = False
    rounded: bool = False
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)

    def frames(self, frames: Frames) -> Inputs:
        resized, size = frames.float(), self.size_of(*frames.shape[-2:])
        if size != tuple(frames.shape[-2:]):
            resized = interpolate(resized, size, mode=self.mode, align_corners=False, antialias=self.antialias)
            resized = resized.clamp(0, 255).round() if self.rounded else resized
        return self._normalised(resized)

    def picture(self, image: Image.Image) -> Inputs:
        """A single image, as VBench prepares what Pillow opened."""
        height, width = self.size_of(image.height, image.width)
        resized = image.convert("RGB").resize((width, height), Image.Resampling[self.mode.upper()])
        return self._normalised(torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float())

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns after resizing; fractions of a pixel are dropped."""
        if self.longest is not None:
            scale = min(1.0, self.longest / max(height, width))
            return int(scale * height), int(scale * width)
        if self.edge is None:
            return height, width
        longer = self.edge if self.square else int(self.edge * max(height, width) / min(height, width))
        return (self.edge, longer) if height <= width else (longer, self.edge)

    def _normalised(self, images: Inputs) -> Float[Tensor, "frames 3 cut_rows cut_columns"]:
        if self.crop is not None:
            top, left = (round((side - self.crop) / 2) for side in images.shape[-2:])
            images = images[..., top : top + self.crop, left : left + self.crop]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images / 255 - mean) / std


UNCHANGED = Preparation()
IMAGENET = Preparation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OPENAI = Preparation(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
DINO = replace(IMAGENET, edge=224)
DINO_OF_IMAGES = replace(IMAGENET, edge=256, crop=224, mode="bicubic", antialias=True)
CLIP = replace(OPENAI, edge=224, crop=224, mode="bicubic")
VICLIP = replace(CLIP, rounded=True)
DREAMSIM = Preparation(edge=224, square=True, mode="bicubic", antialias=True)
MUSIQ = Preparation(longest=512)


@dataclass(frozen=True)
class Encoder:
    """A network with its preprocessing; results are fp32 on the CPU.

    Attributes:
        network: prepared frames on the device, and a text where the formula has one -> a row for each frame.
        at_once: frames that are resized and encoded together.
    """

    network: Callable[..., Tensor]
    preparation: Preparation
    device: torch.device
    at_once: int = 32

    def frames(self, frames: Frames) -> Float[Tensor, "frames ..."]:
        return torch.cat([self._encoded(self.preparation.frames(part)) for part in frames.split(self.at_once)])

    def picture(self, image: Image.Image, *text: str) -> Float[Tensor, "one ..."]:
        return self._encoded(self.preparation.picture(image), *text)

    @torch.no_grad()
    def _encoded(self, pixels: Inputs, *text: str) -> Tensor:
        return self.network(pixels.to(self.device), *text).float().cpu()


def replicated(images: Tensor, divisor: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Pads by repeating the edges until both sides are multiples of `divisor`, as RAFT and AMT do.

    Returns:
        the images, and the padding: left, right, top, bottom.
    """
    height, width = (-side % divisor for side in images.shape[-2:])
    edges = (width // 2, width - width // 2, height // 2, height - height // 2)
    return pad(images, edges, mode="replicate"), edges
