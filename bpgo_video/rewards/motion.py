"""Does a clip move as its prompt says? The embedded world's learned motion model as a reward, one score per video."""

from __future__ import annotations

import torch

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.tiny.motion import MotionMatch


class LearnedMotion:
    """Probability in [0, 1] that the clip's motion matches the prompt.

    Args:
        model: folder that tools/tiny/train_rewards.py wrote.
    """

    name = "learned_motion"
    range = (0.0, 1.0)
    higher_is_better = True
    differentiable = True
    kind = "proxy"
    frames = FrameSampling()

    def __init__(self, model: str, device: torch.device | str = "cpu"):
        folder = resolve_folder(model)
        self.model = MotionMatch.load(folder).to(device)
        self.version = fingerprint(folder, (".",))

    def __call__(self, clips: Clips) -> FrameScores:
        videos = self.model.embed_videos(clips.videos.to(self.model.scale.device))
        match = (videos * self.model.embed_texts(clips.texts)).sum(dim=1, keepdim=True)
        return FrameScores((self.model.scale * match + self.model.bias).sigmoid())
