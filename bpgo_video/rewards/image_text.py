"""How near are frames to texts? Unit vectors of both by a network with two towers (CLIPModel, SiglipModel)."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from bpgo_video.rewards.backbones import Backbone
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.preprocessing import Preprocessing, frame_features
from bpgo_video.rewards.words import Words


class ImageTextEncoder:
    """Frames and prompts in one space.

    Args:
        folder: of the tokenizer.
        as_siglip: texts in lower case, padded to the network's length: so SigLIP was trained, and it reads the last
            token. CLIP reads the end token, which comes before the padding.
    """

    def __init__(self, backbone: Backbone, folder: Path, preprocessing: Preprocessing, as_siglip: bool = False):
        self.backbone, self.preprocessing = backbone, preprocessing
        self.words = Words(backbone, folder, "max_length" if as_siglip else "longest")
        self.cased = str.lower if as_siglip else str

    def scores(self, clips: Clips, sampling: FrameSampling) -> FrameScores:
        """cos(frame, prompt) of the sampled frames."""
        indices = sampling.indices(clips.videos.shape[1], clips.fps)
        images, texts = self.embed_frames(clips, indices), self.embed_texts(clips)
        return FrameScores(torch.einsum("sfd,sd->sf", images, texts), clips.times[indices])

    def embed_frames(self, clips: Clips, indices: list[int]) -> Float[Tensor, "samples scored dim"]:
        """Unit vectors."""
        features = frame_features(clips, indices, self.backbone, self.preprocessing, self._encode)
        return normalize(features, dim=-1)

    def embed_texts(self, clips: Clips) -> Float[Tensor, "samples dim"]:
        """Unit vectors; texts are cut to the network's length. Equal prompts are encoded once."""
        return clips.once((self.backbone.key, "texts"), lambda: self._embed_texts(clips.texts))

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.backbone.network.get_image_features(pixel_values=pixels).pooler_output

    def _embed_texts(self, texts: tuple[str, ...]) -> Tensor:
        network, unique = self.backbone.network, list(dict.fromkeys(map(self.cased, texts)))
        tokens = self.words(unique)
        # Attention is causal in CLIP and unmasked in SigLIP: padding is never masked out.
        features = normalize(network.get_text_features(input_ids=tokens.input_ids).pooler_output.float(), dim=-1)
        return features[[unique.index(self.cased(text)) for text in texts]]
