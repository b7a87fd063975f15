"""How well does each frame show the prompt? CLIPScore: the cosine between a frame's and the text's embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import Backbones, Dtype, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.image_text import ImageTextEncoder
from bpgo_video.rewards.preprocessing import Preprocessing


class ClipScore:
    """cos(image, text) of any CLIPModel (arXiv 2103.00020, 2104.08718), per frame.

    Args:
        model: local folder, hub id (openai/clip-vit-large-patch14) or `package:module/folder`.
        frames: how many frames are scored, spread evenly; None scores all.
        frames_per_second: how many of each second are scored instead.
    """

    name = "clip_score"
    network: type[Any] = CLIPModel
    as_siglip = False
    range = (-1.0, 1.0)
    higher_is_better = True
    differentiable = True
    kind = "real"

    def __init__(
        self,
        model: str,
        frames: int | None = None,
        frames_per_second: float | None = None,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        backbones: Backbones | None = None,
    ):
        folder = resolve_folder(model)
        self.check(folder)
        self.frames = FrameSampling(frames, frames_per_second)
        backbone = (backbones or Backbones()).load(self.network, folder, device, dtype)
        self.encoder = ImageTextEncoder(backbone, folder, Preprocessing.of_folder(folder), self.as_siglip)
        self.version = version([fingerprint(folder, (".",))], self.frames, dtype)

    def check(self, folder: Path) -> None:
        """Whether the folder's model is one of these; the network's own loading says it of CLIP."""

    def __call__(self, clips: Clips) -> FrameScores:
        return self.encoder.scores(clips, self.frames)
