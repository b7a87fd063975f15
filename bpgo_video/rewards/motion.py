"""Motion rewards: VBench's temporal flickering, optical flow (OpenCV's DIS) up to VBench's dynamic degree, and those of
the embedded world of moving shapes: its learned motion model, and its rule for evaluation."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.media import as_bytes
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.base import (
    Clips,
    Device,
    FrameReward,
    FrameSampling,
    FrameScores,
    RewardModel,
    require_two_frames,
)
from bpgo_video.rewards.packaged import imported, release
from bpgo_video.rewards.tiny_motion import MotionMatch
from bpgo_video.rewards.tiny_oracle import RULE, oracle_scores

Scores = Float[Tensor, "samples scored"]
Flow = Float32[np.ndarray, "height width 2"]  # pixels that each point moved, right and down
SHORTER_SIDE = 256  # pixels; larger frames are shrunk to it
DYNAMIC = 6 / 256  # VBench's threshold: of the shorter side, from one scored frame to the next
FASTEST = 0.05  # share of the pixels whose speed counts, the fastest


class TemporalFlickering(FrameReward):
    """(255 - mean |I_t - I_{t-1}|) / 255 for every frame but the first; their mean is VBench's score.

    Exactly VBench's temporal flickering (arXiv 2311.17982), which rounds each inner mean to fp32. A still video
    scores 1.
    """

    name = "temporal_flickering"
    version = "vbench-0.1.5"

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        require_two_frames(self.name, clips)
        differences = np.stack([frame_differences(as_bytes(video)) for video in clips.videos])
        return torch.from_numpy((255 - differences.astype(np.float64)) / 255)


def frame_differences(frames: UInt8[np.ndarray, "frames height width 3"]) -> Float32[np.ndarray, "pairs"]:
    """Mean |I_t - I_{t-1}| over pixels and channels, in [0, 255]."""
    fp32 = np.float32
    return np.array([np.abs(b.astype(fp32) - a.astype(fp32)).mean() for a, b in itertools.pairwise(frames)])


class DynamicDegree(RewardModel):
    """min(1, max(0, speed - shake) / threshold) per pair of frames; 1 is what VBench calls dynamic.

    speed_t is the mean |flow| of the fastest 5 % of the pixels (flow by DIS, arXiv 1603.03590); threshold is 6/256 of
    the shorter side (VBench, arXiv 2311.17982, with RAFT's flow). shake_t = |g_t - g_{t-1}|, where g is the median
    flow, the camera's: a camera that jumps back and forth scores nothing, one that pans steadily does. A still video
    scores 0, and none more than 1.

    Args:
        frames_per_second: how many frames of a second are compared; the threshold is meant for 8.
    """

    name = "dynamic_degree"

    def __init__(self, frames_per_second: float = 8.0):
        self.frames = FrameSampling(fps=frames_per_second)
        self.cv2 = imported("cv2")
        self.cv2.setNumThreads(torch.get_num_threads())  # else every rank starts a thread for each core
        self.flow: Callable[..., Flow] = self.cv2.DISOpticalFlow.create(self.cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc
        self.version = f"{release('opencv-python-headless')}-{self.frames}"

    def __call__(self, clips: Clips) -> FrameScores:
        require_two_frames(self.name, clips)
        indices = self.frames.of(clips)
        if len(indices) < 2:  # a video shorter than the spacing
            indices = [0, clips.videos.shape[1] - 1]
        scores = np.stack([self.score(as_bytes(video[indices])) for video in clips.videos])
        return FrameScores(torch.from_numpy(scores), clips.times[indices[1:]])

    def score(self, frames: UInt8[np.ndarray, "frames height width 3"]) -> Float[np.ndarray, "pairs"]:
        pictures = [self.shrink(frame) for frame in frames]
        flows = [self.flow(before, after, None) for before, after in itertools.pairwise(pictures)]
        net = np.array([speed(flow) for flow in flows]) - shake(flows)
        return np.clip(net / (DYNAMIC * min(pictures[0].shape)), 0, 1)

    def shrink(self, frame: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "small_height small_width"]:
        """Grey, the shorter side at most 256 pixels."""
        grey = self.cv2.cvtColor(frame, self.cv2.COLOR_RGB2GRAY)
        scale = SHORTER_SIDE / min(grey.shape)
        if scale >= 1:
            return grey
        return self.cv2.resize(grey, None, fx=scale, fy=scale, interpolation=self.cv2.INTER_AREA)


def speed(flow: Flow) -> float:
    """Mean length of the longest 5 % of the vectors, in pixels."""
    lengths = np.linalg.norm(flow, axis=-1).ravel()
    count = max(1, int(FASTEST * lengths.size))
    return float(np.partition(lengths, -count)[-count:].mean())


def shake(flows: list[Flow]) -> Float[np.ndarray, "pairs"]:
    """How far the camera's movement changed since the pair before, in pixels; the first pair takes the second's."""
    camera = np.stack([np.median(flow, axis=(0, 1)) for flow in flows])
    changes = np.linalg.norm(np.diff(camera, axis=0), axis=1)
    return np.concatenate([changes[:1], changes]) if len(changes) else np.zeros(1)


class LearnedMotion(RewardModel):
    """Probability in [0, 1] that the clip's motion matches the prompt, one score per video.

    Args:
        model: folder that tools/tiny/train_rewards.py wrote.
    """

    name, kind, differentiable = "learned_motion", "proxy", True

    def __init__(self, model: str, device: Device = "cpu"):
        folder = resolve_folder(model)
        self.model = MotionMatch.load(folder).to(device)
        self.version = fingerprint(folder, (".",))

    def __call__(self, clips: Clips) -> FrameScores:
        videos = self.model.embed_videos(clips.videos.to(self.model.scale.device))
        match = (videos * self.model.embed_texts(clips.texts)).sum(dim=1, keepdim=True)
        return FrameScores((self.model.scale * match + self.model.bias).sigmoid())


class ShapesOracle(FrameReward):
    """`bpgo_video.rewards.tiny_oracle`: whether a frame shows what the caption says, in [0, 1]."""

    name, kind = "shapes_oracle", "test"
    version = hashlib.sha256(repr(RULE).encode()).hexdigest()[:16]

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        return oracle_scores(clips.videos, clips.texts)
