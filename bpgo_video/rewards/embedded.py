"""Rewards of the embedded world of moving shapes: its learned motion model, and its rule for evaluation."""

from __future__ import annotations

import hashlib

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.base import Clips, Device, FrameScores, RewardModel
from bpgo_video.tiny.motion import MotionMatch
from bpgo_video.tiny.oracle import RULE, oracle_scores


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


class ShapesOracle(RewardModel):
    """`bpgo_video.tiny.oracle`: whether a frame shows what the caption says, in [0, 1]."""

    name, kind = "shapes_oracle", "test"
    version = hashlib.sha256(repr(RULE).encode()).hexdigest()[:16]

    def __call__(self, clips: Clips) -> FrameScores:
        return FrameScores(oracle_scores(clips.videos, clips.texts), clips.times)
