"""Does the video as a whole show what the prompt says? X-CLIP's cosine between video and text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, XCLIPModel

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.backbones import Backbones, Dtype, version
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.preprocessing import Preprocessing, spread, video_features


class XClipScore:
    """cos(video, text | video) of an XCLIPModel (arXiv 2208.02816), one score a video.

    The network's own number of frames is taken, spread evenly (8 in microsoft/xclip-base-patch32). The text's embedding
    depends on the video: it is shifted by attention over the video's patches.

    Args:
        model: local folder or hub id (microsoft/xclip-base-patch32).
    """

    name = "xclip_score"
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
        self.backbone = (backbones or Backbones()).load(XCLIPModel, folder, device, dtype)
        self.frames = FrameSampling(count=self.backbone.network.config.vision_config.num_frames)
        self.preprocessing = Preprocessing.of_folder(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.version = version([fingerprint(folder, (".",))], self.frames, dtype)

    def __call__(self, clips: Clips) -> FrameScores:
        network = self.backbone.network
        length = network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(clips.texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.backbone.device)

        def cosines(pixels: Tensor, rows: slice) -> Tensor:
            found = network(input_ids=tokens.input_ids[rows], pixel_values=pixels)
            return (found.logits_per_video / network.logit_scale.exp()).diagonal()

        indices = spread(self.frames.count or 1, clips.videos.shape[1])
        return FrameScores(video_features(clips, indices, self.backbone, self.preprocessing, cosines)[:, None])
