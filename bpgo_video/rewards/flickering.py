"""How much do neighbouring frames differ? VBench's temporal flickering (arXiv 2311.17982), exactly."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from bpgo_video.data.video import as_bytes
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, at_least_two_frames


class TemporalFlickering:
    """(255 - mean |I_t - I_{t-1}|) / 255 for every frame but the first; their mean is VBench's score.

    VBench rounds each inner mean to fp32; so does this. A still video scores 1.
    """

    name = "temporal_flickering"
    range = (0.0, 1.0)
    higher_is_better = True
    differentiable = False
    kind = "real"
    frames = FrameSampling()
    version = "vbench-0.1.5"

    def __call__(self, clips: Clips) -> FrameScores:
        at_least_two_frames(self.name, clips)
        differences = np.stack([frame_differences(as_bytes(video)) for video in clips.videos])
        return FrameScores(torch.from_numpy((255 - differences.astype(np.float64)) / 255), clips.times[1:])


def frame_differences(frames: UInt8[np.ndarray, "frames height width 3"]) -> Float32[np.ndarray, "pairs"]:
    """Mean |I_t - I_{t-1}| over pixels and channels, in [0, 255]."""
    fp32 = np.float32
    return np.array([np.abs(b.astype(fp32) - a.astype(fp32)).mean() for a, b in itertools.pairwise(frames)])
