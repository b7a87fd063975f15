"""Which picture would people pick for the prompt? PickScore, per frame."""

from __future__ import annotations

import torch
from transformers import CLIPModel

from bpgo_video.data.fingerprint import fingerprint, fingerprint_of
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import WITHOUT_WEIGHTS, Backbones, Dtype, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.image_text import ImageTextEncoder
from bpgo_video.rewards.preprocessing import Preprocessing


class PickScore:
    """exp(logit_scale) cos(image, text) of a CLIPModel trained on people's choices (arXiv 2305.01569).

    Frames of good videos come out between 18 and 24.

    Args:
        model: local folder or hub id (yuvalkirstain/PickScore_v1).
        processor: folder or hub id of tokenizer and preprocessor_config.json where `model` lacks them
            (laion/CLIP-ViT-H-14-laion2B-s32B-b79K, as the authors take it).
        frames, frames_per_second: as in ClipScore.
    """

    name = "pickscore"
    higher_is_better = True
    differentiable = True
    kind = "real"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = None,
        frames: int | None = None,
        frames_per_second: float | None = None,
        device: torch.device | str = "cpu",
        dtype: Dtype = "float32",
        backbones: Backbones | None = None,
    ):
        folder = resolve_folder(model)
        words = folder if processor is None else resolve_folder(processor, only=WITHOUT_WEIGHTS)
        self.frames = FrameSampling(frames, frames_per_second)
        backbone = (backbones or Backbones()).load(CLIPModel, folder, device, dtype)
        self.encoder = ImageTextEncoder(backbone, words, Preprocessing.of_folder(words))
        self.scale = float(backbone.network.logit_scale.float().exp())
        self.range = (-self.scale, self.scale)
        parts = [fingerprint(folder, (".",))]
        if processor is not None:
            parts.append(fingerprint_of(words, WITHOUT_WEIGHTS))
        self.version = version(parts, self.frames, dtype)

    def __call__(self, clips: Clips) -> FrameScores:
        cosines = self.encoder.scores(clips, self.frames)
        return FrameScores(self.scale * cosines.values, cosines.times)
