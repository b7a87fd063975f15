"""Does the subject stay itself? Cosines between the frames' features of a self-supervised vision transformer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel

from bpgo_video.rewards.base import Clips, FrameScores
from bpgo_video.rewards.frame_network import FrameNetwork
from bpgo_video.rewards.preprocessing import frame_features

Features = Float[Tensor, "samples scored dim"]


class _DinoFrames(FrameNetwork):
    """Frames through DINOv2 (arXiv 2304.07193) or DINO (2104.14294): the class token of the last layer.

    Args:
        model: local folder or hub id (facebook/dinov2-base; facebook/dino-vitb16 is VBench's network).
        frames, frames_per_second: as in ClipScore.
    """

    network = AutoModel
    unread = ("pooler.",)
    range = (0.0, 1.0)

    def features(self, clips: Clips, indices: list[int]) -> Features:
        return frame_features(clips, indices, self.backbone, self.preprocessing, self._encode)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.backbone.network(pixel_values=pixels).last_hidden_state[:, 0]


class SubjectConsistency(_DinoFrames):
    """(max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_0)))/2 of each scored frame t after the first.

    Its mean is VBench's subject_consistency (arXiv 2311.17982), on frames that are cut to the network's square;
    VBench's are not cut. A still video earns the most: train on it only beside a reward of motion. A video of one
    frame earns 1.
    """

    name = "subject_consistency"

    def __call__(self, clips: Clips) -> FrameScores:
        indices = self.frames.indices(clips.videos.shape[1], clips.fps)
        found = self.features(clips, indices)
        if len(indices) == 1:
            return FrameScores(torch.ones_like(found[:, :, 0]), clips.times[indices])
        before = cosine_similarity(found[:, 1:], found[:, :-1], dim=-1).clamp(min=0)
        first = cosine_similarity(found[:, 1:], found[:, :1], dim=-1).clamp(min=0)
        return FrameScores((before + first) / 2, clips.times[indices[1:]])


class FirstFrameConsistency(_DinoFrames):
    """cos(f_t, f) of each scored frame, where f is the picture to be continued, or frame 0 where there is none."""

    name = "first_frame_consistency"
    range = (-1.0, 1.0)

    def __call__(self, clips: Clips) -> FrameScores:
        indices = self.frames.indices(clips.videos.shape[1], clips.fps)
        found = self.features(clips, indices)
        first = found[:, :1]
        if clips.images is not None:
            first = self.features(Clips(clips.images[:, None], clips.fps, clips.texts), [0])
        return FrameScores(cosine_similarity(found, first, dim=-1), clips.times[indices])
