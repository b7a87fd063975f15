"""How well does each frame show the prompt? CLIPScore: the cosine between a frame's and the text's embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPModel

from bpgo_video.rewards.base import Clips, FrameScores
from bpgo_video.rewards.frame_network import FrameNetwork
from bpgo_video.rewards.image_text import ImageTextEncoder


class ClipScore(FrameNetwork):
    """cos(image, text) of any CLIPModel (arXiv 2103.00020, 2104.08718), per frame.

    Args:
        model: local folder, hub id (openai/clip-vit-large-patch14) or `package:module/folder`.
        frames: how many frames are scored, spread evenly; None scores all.
        frames_per_second: how many of each second are scored instead.
    """

    name = "clip_score"
    network: Any = CLIPModel
    as_siglip = False
    range = (-1.0, 1.0)

    def prepare(self, folder: Path) -> None:
        self.encoder = ImageTextEncoder(self.backbone, folder, self.preprocessing, self.as_siglip)

    def __call__(self, clips: Clips) -> FrameScores:
        return self.encoder.scores(clips, self.frames)


class ClipImageScore(ClipScore):
    """cos(frame, picture to be continued) of any CLIPModel, per frame: CLIP-I (arXiv 2208.12242).

    Where there is no picture it is frame 0. A still video earns the most: train on it only beside a reward that asks for
    what the text says.
    """

    name = "clip_image_score"

    def __call__(self, clips: Clips) -> FrameScores:
        indices = self.frames.indices(clips.videos.shape[1], clips.fps)
        found = self.encoder.embed_frames(clips, indices)
        picture = found[:, :1]
        if clips.images is not None:
            picture = self.encoder.embed_frames(Clips(clips.images[:, None], clips.fps, clips.texts), [0])
        return FrameScores((found * picture).sum(dim=-1), clips.times[indices])
