"""How well does each frame show the prompt? CLIPScore: the cosine between a frame's and the text's embedding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoTokenizer, CLIPModel

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores

FRAMES_AT_ONCE = 64


class ClipScore:
    """cos(image, text) of any CLIPModel (arXiv 2103.00020, 2104.08718), per frame.

    Preprocessing is torch alone, with antialiasing, so that scores are differentiable in the pixels.

    Args:
        model: local folder, hub id (openai/clip-vit-large-patch14) or `package:module/folder`.
        frames: how many frames are scored, spread evenly; None scores all.
        frames_per_second: how many of each second are scored instead.
    """

    name = "clip_score"
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
        dtype: torch.dtype = torch.float32,
    ):
        folder = resolve_folder(model)
        self.frames = FrameSampling(frames, frames_per_second)
        clip: Any = CLIPModel.from_pretrained(folder, dtype=dtype)
        self.clip = clip.to(device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.size, self.mean, self.std = _preprocessing(folder)
        self.version = "-".join((fingerprint(folder, (".",)), str(self.frames)))

    def __call__(self, clips: Clips) -> FrameScores:
        indices = self.frames.indices(clips.videos.shape[1], clips.fps)
        chosen = clips.videos[:, indices]
        images = self.embed_frames(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2])
        return FrameScores(torch.einsum("sfd,sd->sf", images, self.embed_texts(clips.texts)), clips.times[indices])

    def embed_frames(self, frames: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames dim"]:
        """Unit vectors of images in [0, 1]."""
        device, dtype = self.clip.device, self.clip.dtype
        embeddings = [
            self.clip.get_image_features(pixel_values=self.preprocess(chunk.to(device)).to(dtype)).pooler_output
            for chunk in frames.split(FRAMES_AT_ONCE)
        ]
        return normalize(torch.cat(embeddings).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Unit vectors; texts are cut to the model's length."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        features = self.clip.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return normalize(features.pooler_output.float(), dim=-1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Shorter side to the model's size (bicubic, antialiased), centre crop, normalise."""
        height, width = images.shape[-2:]
        scale = self.size / min(height, width)
        resized = (round(height * scale), round(width * scale))
        if resized != (height, width):
            images = interpolate(images, resized, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (resized[0] - self.size) // 2, (resized[1] - self.size) // 2
        images = images[..., top : top + self.size, left : left + self.size]
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std


def _preprocessing(folder: Path) -> tuple[int, list[float], list[float]]:
    """Crop size, mean and standard deviation from the folder's preprocessor_config.json."""
    config = json.loads((folder / "preprocessor_config.json").read_text())
    size = config.get("crop_size", config["size"])
    size = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    return int(size), config["image_mean"], config["image_std"]
