"""Videos for reward tests, and PIL and numpy preprocessing of their frames as a reference."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

from bpgo_video.rewards import Clips
from tests.made.random_rewards import MEAN, STD

TEXTS = ("a red circle moving left", "a green square")


def some_clips(frames: int = 5, height: int = 45, width: int = 64) -> Clips:
    """Smooth videos: upscaled low-resolution noise."""
    noise = torch.rand(2 * frames, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    videos = nn.functional.interpolate(noise, (height, width), mode="bilinear").unflatten(0, (2, frames))
    return Clips(videos, 8.0, TEXTS)


def resized(frame: torch.Tensor, height: int, width: int, kernel: Image.Resampling) -> np.ndarray:
    """Frames resized by PIL, with each channel in floats."""
    channels = [np.asarray(Image.fromarray(channel.numpy()).resize((width, height), kernel)) for channel in frame]
    return np.clip(np.stack(channels), 0, 1)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    mean, std = (np.array(v)[:, None, None] for v in (MEAN, STD))
    return torch.tensor((pixels - mean) / std, dtype=torch.float32)[None]


def cut(frame: torch.Tensor, edge: int, size: int, kernel: Image.Resampling = Image.Resampling.BICUBIC) -> torch.Tensor:
    """Frames with the shorter side resized to `edge`, then centre-cropped to `size`."""
    height, width = frame.shape[-2:]
    scale = edge / min(height, width)
    pixels = resized(frame, int(height * scale), int(width * scale), kernel)
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return normalised(pixels[:, top : top + size, left : left + size])


def unit(vector: torch.Tensor) -> np.ndarray:
    found = vector.detach().double().numpy().reshape(-1)
    return found / np.linalg.norm(found)
