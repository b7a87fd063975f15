"""How much would people like each frame as a picture of the prompt? Human Preference Score v2.1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from bpgo_video.data.fingerprint import fingerprint_of
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import WITHOUT_WEIGHTS, Backbones, Dtype, from_weights, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.image_text import ImageTextEncoder
from bpgo_video.rewards.open_clip import from_open_clip
from bpgo_video.rewards.preprocessing import Preprocessing
from bpgo_video.rewards.weights import read_weights


class HPSv2:
    """cos(image, text) of open_clip's ViT-H-14 fine-tuned on people's choices (arXiv 2306.09341), per frame.

    The whole frame is seen: its longer side is brought to the network's size, the rest is black. Frames come out
    between .2 and .35.

    Args:
        model: local folder or hub id (xswu/HPSv2) that holds `checkpoint`, of open_clip's format.
        base: folder or hub id of a CLIPModel of the same shape, for its configuration, tokenizer and preprocessing; its
            weights are not read.
        frames, frames_per_second: as in ClipScore.
    """

    name = "hpsv2"
    range = (-1.0, 1.0)
    higher_is_better = True
    differentiable = True
    kind = "real"

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        base: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        checkpoint: str = "HPS_v2.1_compressed.pt",
        frames: int | None = None,
        frames_per_second: float | None = None,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        backbones: Backbones | None = None,
    ):
        folder = resolve_folder(model, only=(checkpoint,))
        shape = resolve_folder(base, only=WITHOUT_WEIGHTS)
        self.frames = FrameSampling(frames, frames_per_second)
        source = (CLIPModel.__name__, str((folder / checkpoint).resolve()), str(shape.resolve()))
        backbone = (backbones or Backbones()).once(
            source, device, dtype, lambda d: _load(folder / checkpoint, shape, d)
        )
        whole_frame = replace(Preprocessing.of_folder(shape), fit="pad", edge=0)
        self.encoder = ImageTextEncoder(backbone, shape, whole_frame)
        parts = fingerprint_of(folder, (checkpoint,)), fingerprint_of(shape, WITHOUT_WEIGHTS)
        self.version = version(parts, self.frames, dtype)

    def __call__(self, clips: Clips) -> FrameScores:
        return self.encoder.scores(clips, self.frames)


def _load(checkpoint: Path, shape: Path, dtype: torch.dtype) -> nn.Module:
    config, weights = CLIPConfig.from_pretrained(shape), from_open_clip(read_weights(checkpoint))
    return from_weights(CLIPModel, config, weights, checkpoint, dtype)
