"""How do neighbouring frames differ? VBench's flickering, smoothness and dynamic degree (arXiv 2311.17982)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.evaluation.vbench.dimension import Dimension, DimensionError, Footage, Measured, Network, Sources
from bpgo_video.evaluation.vbench.pixels import Frames, replicated
from bpgo_video.rewards.motion import DYNAMIC, DynamicDegree, frame_differences, speed

Image = Float[Tensor, "1 3 height width"]
Pairs = Callable[[Frames], list[bool]]  # whether the frames of each pair are farther apart than VBench's threshold
Interpolator = Callable[[Image, Image], Image]

FLOW_FPS = 8  # frames of a second that dynamic degree compares
FLOW_DIVISOR, INTERPOLATION_DIVISOR = 8, 16  # of the sides, for RAFT and for AMT


def flickering(_: None, footage: Footage) -> Measured:
    """(255 - mean_t mean |I_{t+1} - I_t|)/255, with inner means in fp32: VBench's number to the last digit."""
    at_least_two(footage)
    differences = frame_differences(footage.frames.permute(0, 2, 3, 1).numpy())
    return Measured((255.0 - float(np.mean(differences))) / 255.0)


def dynamic_degree(pairs: Pairs, footage: Footage) -> Measured:
    """Whether round(4 T/16) or more pairs of T frames, 8 a second, move faster than 6/256 of the shorter side."""
    interval = max(1, round(footage.fps / FLOW_FPS))
    frames = footage.frames[::interval]
    faster = pairs(frames)
    return Measured(bool(faster) and sum(faster) >= round(4 * len(frames) / 16))


def adopt_flow(built: Any, sources: Sources) -> Pairs:
    """A user's optical flow.

    It takes two frames of 0 to 255 on the device, (1, 3, height, width), sides multiples of 8, and gives the flow in
    pixels, (1, 2, height, width).
    """

    @torch.no_grad()
    def pairs(frames: Frames) -> list[bool]:
        threshold = 6.0 * (min(frames.shape[-2:]) / 256.0)
        found = []
        for before, after in itertools.pairwise(frames):
            padded = [replicated(frame[None].float().to(sources.device), FLOW_DIVISOR)[0] for frame in (before, after)]
            flow = built(*padded)[0].permute(1, 2, 0).float().cpu().numpy()
            found.append(speed(flow) > threshold)
        return found

    return pairs


def dis(_: Sources) -> Network:
    """OpenCV's DIS flow in RAFT's place, on frames of 256 pixels at most on the shorter side."""
    reward = DynamicDegree()

    def pairs(frames: Frames) -> list[bool]:
        pictures = [reward.shrink(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().numpy()]
        flows = [reward.flow(before, after, None) for before, after in itertools.pairwise(pictures)]
        return [speed(flow) > DYNAMIC * min(flow.shape[:2]) for flow in flows]

    return Network(pairs, "proxy", f"DIS {reward.version}")


def smoothness(interpolate: Interpolator, footage: Footage) -> Measured:
    """(255 - mean |I_odd - I'|)/255, where I' is made of the even frames on both sides and cut to bytes.

    VBench lets AMT work on smaller frames where a GPU's memory is short; here it never does.
    """
    even, odd = footage.frames[::2], footage.frames[1::2]
    if len(even) < 2:
        raise DimensionError(f"{footage.path} has {len(footage.frames)} frames; smoothness needs three")
    errors = []
    for before, middle, after in zip(even[:-1], odd, even[1:], strict=False):  # an even number leaves an odd one over
        made = interpolate(*(frame[None].float() / 255 for frame in (before, after)))
        cut = (made[0] * 255).clamp(0, 255).to(torch.uint8)
        errors.append(float((cut.int() - middle.int()).abs().double().mean()))
    return Measured((255.0 - float(np.mean(errors))) / 255.0)


def adopt_interpolator(built: Any, sources: Sources) -> Interpolator:
    """A user's frame interpolation.

    It takes two frames in [0, 1] on the device, (1, 3, height, width), sides multiples of 16, and gives their middle.
    """

    @torch.no_grad()
    def interpolate(before: Image, after: Image) -> Image:
        (one, edges), (two, _) = (
            replicated(frame.to(sources.device), INTERPOLATION_DIVISOR) for frame in (before, after)
        )
        left, right, top, bottom = edges
        made = built(one, two)
        return made[..., top : made.shape[-2] - bottom, left : made.shape[-1] - right].float().cpu()

    return interpolate


def at_least_two(footage: Footage) -> None:
    if len(footage.frames) < 2:
        raise DimensionError(f"{footage.path} has one frame; this dimension compares neighbouring ones")


TEMPORAL_FLICKERING = Dimension(flickering)
DYNAMIC_DEGREE = Dimension(dynamic_degree, default="dis", named={"dis": dis}, adopt=adopt_flow, usual="RAFT")
MOTION_SMOOTHNESS = Dimension(smoothness, adopt=adopt_interpolator, usual="a frame interpolation (VBench's is AMT-S)")
