"""What do rewards of frames share that stand on one model folder? Network, sampling, preprocessing and version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import Backbones, Dtype, version
from bpgo_video.rewards.base import FrameSampling
from bpgo_video.rewards.preprocessing import Preprocessing


class FrameNetwork:
    """A reward of sampled frames on the network of a folder; a subclass says which network, and how it scores.

    Args:
        model: local folder, hub id or `package:module/folder`.
        frames: how many frames are scored, spread evenly; None scores all.
        frames_per_second: how many of each second are scored instead.

    Attributes:
        network: the transformers class.
        unread: prefixes of parameters that the reward does not use: a folder may lack them.
    """

    network: Any
    unread: tuple[str, ...] = ()
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
        self.backbone = (backbones or Backbones()).load(self.network, folder, device, dtype, self.unread)
        self.preprocessing = Preprocessing.of_folder(folder)
        self.version = version([fingerprint(folder, (".",))], self.frames, dtype)
        self.prepare(folder)

    def check(self, folder: Path) -> None:
        """Whether the folder's model is one of these, where loading it would not say so."""

    def prepare(self, folder: Path) -> None:
        """What else the scores need of the folder."""
