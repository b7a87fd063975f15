"""Does a clip move as its prompt says? The embedded world's learned motion model as a reward, one score per video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.tiny.motion import MotionMatch
from bpgo_video.types import Videos


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

    def __init__(self, model: str, device: torch.device | str = "cpu"):
        folder = resolve_folder(model)
        self.model = MotionMatch.load(folder).to(device)
        self.version = fingerprint(folder, (".",))

    def __call__(self, videos: Videos, texts: Sequence[str]) -> Float[Tensor, "samples 1"]:
        embeddings = self.model.embed_videos(videos.to(self.model.scale.device)), self.model.embed_texts(texts)
        return (self.model.scale * (embeddings[0] * embeddings[1]).sum(dim=1, keepdim=True) + self.model.bias).sigmoid()
