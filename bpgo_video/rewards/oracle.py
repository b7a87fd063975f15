"""Does a video of the embedded world show what its caption asks for? The world's own rule, for evaluation."""

from __future__ import annotations

import hashlib

from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.tiny.oracle import RULE, oracle_scores


class ShapesOracle:
    """`bpgo_video.tiny.oracle` as a reward model: a score in [0, 1] per frame."""

    name = "shapes_oracle"
    range = (0.0, 1.0)
    higher_is_better = True
    differentiable = False
    kind = "test"
    frames = FrameSampling()
    version = hashlib.sha256(repr(RULE).encode()).hexdigest()[:16]

    def __call__(self, clips: Clips) -> FrameScores:
        return FrameScores(oracle_scores(clips.videos, clips.texts), clips.times)
