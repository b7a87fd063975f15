"""How near is a video to its text? One cosine a video, by a network that reads a fixed number of frames at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import Backbones, Dtype, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.preprocessing import Preprocessing, spread, video_features
from bpgo_video.rewards.words import Words


class VideoTextScore(ABC):
    """A reward of whole videos; a subclass says which network, what it sees, and how it compares.

    The network's own number of frames is taken, spread evenly.

    Args:
        model: local folder or hub id.

    Attributes:
        network: the transformers class.
        padding: of the texts, see `Words`.
    """

    network: Any
    padding = "longest"
    range = (-1.0, 1.0)
    higher_is_better = True
    differentiable = True
    kind = "real"

    def __init__(
        self,
        model: str,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        backbones: Backbones | None = None,
    ):
        folder = resolve_folder(model)
        self.backbone = (backbones or Backbones()).load(self.network, folder, device, dtype)
        self.frames = FrameSampling(count=self.backbone.network.config.vision_config.num_frames)
        self.preprocessing = self.preprocessing_of(folder)
        self.words = Words(self.backbone, folder, self.padding)
        self.version = version([fingerprint(folder, (".",))], self.frames, dtype)

    def preprocessing_of(self, folder: Path) -> Preprocessing:
        return Preprocessing.of_folder(folder)

    @abstractmethod
    def cosines(self, texts: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        """(pixels of some videos, their rows among the texts) -> a cosine each."""

    def __call__(self, clips: Clips) -> FrameScores:
        indices = spread(self.frames.count or 1, clips.videos.shape[1])
        cosines = self.cosines(clips.texts)
        return FrameScores(video_features(clips, indices, self.backbone, self.preprocessing, cosines)[:, None])
