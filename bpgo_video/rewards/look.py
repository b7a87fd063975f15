"""How videos look, whatever they show: brightness, clipped highlights, saturation and contrast. No network.

Training on a reward can make pictures brighter, more colourful or harsher than they were, which many rewards pay for.
None of these measures has a good direction: evaluations watch them for drift (`training/heldout.py`), and nothing
trains on them. As a held-out reward: {model: "bpgo_video.rewards.look:Look", options: {measure: saturation}}.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.learner import RewardConfig
from bpgo_video.rewards.base import Clips, Device, FrameReward, FrameSampling, Scores

LUMA = (0.2126, 0.7152, 0.0722)  # of red, green and blue: ITU-R BT.709
WHITE = 0.98  # luma from which a pixel is clipped

Frame = Float[Tensor, "samples 3 height width"]  # one frame of each video, in [0, 1]


def luma(frame: Frame) -> Float[Tensor, "samples height width"]:
    return torch.einsum("schw,c->shw", frame, frame.new_tensor(LUMA))


def brightness(frame: Frame) -> Float[Tensor, "samples"]:
    """Mean luma."""
    return luma(frame).mean(dim=(1, 2))


def clipped(frame: Frame) -> Float[Tensor, "samples"]:
    """Share of the pixels whose luma is at least WHITE: overexposed highlights."""
    return (luma(frame) >= WHITE).float().mean(dim=(1, 2))


def saturation(frame: Frame) -> Float[Tensor, "samples"]:
    """Mean distance of a pixel's largest channel from its smallest; 0 is grey."""
    return (frame.amax(dim=1) - frame.amin(dim=1)).mean(dim=(1, 2))


def contrast(frame: Frame) -> Float[Tensor, "samples"]:
    """Standard deviation of the luma over a frame's pixels."""
    return luma(frame).flatten(1).std(dim=1, correction=0)


MEASURES: dict[str, Callable[[Frame], Tensor]] = {
    "brightness": brightness,
    "clipped": clipped,
    "saturation": saturation,
    "contrast": contrast,
}


class Look(FrameReward):
    """One of MEASURES of each scored frame, in [0, 1].

    Args:
        measure: a key of MEASURES.
        frames: number of scored frames, evenly spread; None scores all.
    """

    name = "look"

    def __init__(self, measure: str, frames: int | None = 8, device: Device = "cpu"):
        if measure not in MEASURES:
            raise ValueError(f"measure is {measure!r}; it can be {', '.join(MEASURES)}")
        self.measure, self.frames, self.device = measure, FrameSampling(frames), torch.device(device)
        self.version = f"{measure}-{self.frames}"

    @torch.no_grad()
    def score(self, clips: Clips, indices: list[int]) -> Scores:
        measure = MEASURES[self.measure]
        frames = (clips.videos[:, index].to(self.device).float() for index in indices)  # one at a time on the device
        return torch.stack([measure(frame) for frame in frames], dim=1)


WATCHED = {  # what evaluations score besides the recipe's rewards, by their keys in metrics
    f"look/{measure}": RewardConfig(model="bpgo_video.rewards.look:Look", options={"measure": measure})
    for measure in MEASURES
}
