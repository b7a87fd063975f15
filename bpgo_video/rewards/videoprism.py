"""Does the video as a whole show what the prompt says? VideoPrism's cosine between video and text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import VideoPrismClipModel

from bpgo_video.rewards.preprocessing import Preprocessing
from bpgo_video.rewards.video_text import VideoTextScore


class VideoPrismScore(VideoTextScore):
    """cos(video, text) of a VideoPrismClipModel (arXiv 2402.13217), one score a video.

    The network's own number and size of frames is taken, stretched, as values in [0, 1] (16 frames at 288x288 in
    google/videoprism-lvt-base-f16r288).
    """

    name = "videoprism_score"
    network = VideoPrismClipModel
    padding = "max_length"

    def preprocessing_of(self, folder: Path) -> Preprocessing:
        found = self.backbone.network.config.vision_config.image_size
        size = (found,) * 2 if isinstance(found, int) else tuple(found)
        return Preprocessing("stretch", size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def cosines(self, texts: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        network, tokens = self.backbone.network, self.words(texts)
        towards = network.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output.float()

        def compare(pixels: Tensor, rows: slice) -> Tensor:
            videos = network.get_video_features(pixels).pooler_output.flatten(1).float()
            return cosine_similarity(videos, towards[rows], dim=-1)

        return compare
