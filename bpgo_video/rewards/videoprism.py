"""Does the video as a whole show what the prompt says? VideoPrism's cosine between video and text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, VideoPrismClipModel

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import Backbones, Dtype, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.preprocessing import Preprocessing, spread, video_features


class VideoPrismScore:
    """cos(video, text) of a VideoPrismClipModel (arXiv 2402.13217), one score a video.

    The network's own number and size of frames is taken, stretched, as values in [0, 1] (16 frames at 288x288 in
    google/videoprism-lvt-base-f16r288).

    Args:
        model: local folder or hub id.
    """

    name = "videoprism_score"
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
        self.backbone = (backbones or Backbones()).load(VideoPrismClipModel, folder, device, dtype)
        vision = self.backbone.network.config.vision_config
        size = (vision.image_size,) * 2 if isinstance(vision.image_size, int) else tuple(vision.image_size)
        self.frames = FrameSampling(count=vision.num_frames)
        self.preprocessing = Preprocessing("stretch", size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.version = version([fingerprint(folder, (".",))], self.frames, dtype)

    def __call__(self, clips: Clips) -> FrameScores:
        network = self.backbone.network
        length = network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(clips.texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.backbone.device)
        texts = network.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output.float()

        def encode(pixels: Tensor, _: slice) -> Tensor:
            return network.get_video_features(pixels).pooler_output.flatten(1)

        indices = spread(self.frames.count or 1, clips.videos.shape[1])
        videos = video_features(clips, indices, self.backbone, self.preprocessing, encode)
        return FrameScores(torch.nn.functional.cosine_similarity(videos, texts, dim=-1)[:, None])
