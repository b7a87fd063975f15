"""Does a clip move as its caption says? A small learned dual encoder of video and text, for the embedded world.

P(match) = sigmoid(scale cos(video, text) + bias). Convolutions over time see direction, which a frame cannot show; mean
pooling over time and space forgets where the thing is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize

from bpgo_video.rewards import tiny_world as world
from bpgo_video.types import Videos

WORDS = sorted({word for caption in world.all_captions() for word in caption.text.split()})


def block(inputs: int, outputs: int, time: int, stride: int) -> nn.Sequential:
    """A convolution over `time` frames and 3x3 pixels, each channel normalised on its own."""
    convolution = nn.Conv3d(inputs, outputs, (time, 3, 3), stride=(1, stride, stride), padding=((time - 1) // 2, 1, 1))
    return nn.Sequential(convolution, nn.GroupNorm(4, outputs), nn.SiLU())


class MotionMatch(nn.Module):
    """Video and text encoders with a shared embedding.

    Args:
        words: the vocabulary; other words are ignored.
        width: channels of the first convolution.
        dim: of the shared embedding.
    """

    def __init__(self, words: Sequence[str] = WORDS, width: int = 16, dim: int = 32):
        super().__init__()
        self.config: dict[str, Any] = {"words": list(words), "width": width, "dim": dim}
        self.video = nn.Sequential(
            block(3, width, 1, 2),
            block(width, 2 * width, 3, 2),
            block(2 * width, 2 * width, 3, 1),
            block(2 * width, 4 * width, 3, 2),
        )
        self.video_head = nn.Linear(8 * width, dim)
        self.words = nn.Parameter(torch.randn(len(words), dim))
        self.text_head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def embed_videos(self, videos: Videos) -> Float[Tensor, "samples dim"]:
        """Unit vectors of clips in [0, 1]; any number of frames from three on."""
        halved = avg_pool2d(videos.flatten(0, 1), 2).unflatten(0, videos.shape[:2])
        features = self.video((halved * 4 - 1).transpose(1, 2))
        steady, worst = features.mean(dim=(2, 3, 4)), features.amax(dim=(3, 4)).amin(dim=2)
        return normalize(self.video_head(torch.cat([steady, worst], dim=1)), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Unit vectors of captions, from the sum of their words' vectors."""
        counts = [[text.lower().split().count(word) for word in self.config["words"]] for text in texts]
        return normalize(self.text_head(self.words.new_tensor(counts) @ self.words), dim=-1)

    def logits(
        self, videos: Float[Tensor, "samples dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "samples texts"]:
        """Of each video's match with each text, from their embeddings."""
        return self.scale * videos @ texts.T + self.bias

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", "utf-8")
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> MotionMatch:
        """The model that `save` wrote, frozen, in evaluation mode."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model = cls(**config)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval().requires_grad_(False)
