"""VBench's formulas: a network and one video -> one number.

The papers are arXiv 2311.17982 (VBench) and 2411.13503 (VBench-I2V). cos+ is max(0, cos), f_t the feature of frame t, f
that of the image which the video continues.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bpgo_video.evaluation.vbench_pixels import Encoder, Frames
from bpgo_video.evaluation.vbench_suite import SuitePrompt

Picture = Float[Tensor, "1 3 height width"]
Tracks = Int[Tensor, "frames 10 10 2"]  # x and y of grid points in each frame, whole pixels

FLOW_FPS = 8  # frames of a second that dynamic degree compares
GRID = 10  # points a side that camera motion follows
STILL = 0.005  # of the shorter side: a point that moved less stands still
STATIC, ZOOM_IN, ZOOM_OUT = "camera static", "camera zooms in", "camera zooms out"
ALIKE = {  # directions of two opposite edges, where they show a motion, in the words of a prompt
    ("right", "right"): "camera pans left",
    ("left", "left"): "camera pans right",
    ("down", "down"): "camera tilts up",
    ("up", "up"): "camera tilts down",
    ("static", "static"): STATIC,
}
TOP_BOTTOM = {**ALIKE, ("up", "down"): ZOOM_IN, ("down", "up"): ZOOM_OUT}
LEFT_RIGHT = {**ALIKE, ("left", "right"): ZOOM_IN, ("right", "left"): ZOOM_OUT}


class DimensionError(ValueError):
    """A dimension that cannot be measured; the message says what it needs."""


@dataclass(frozen=True)
class Footage:
    """One video.

    Attributes:
        frames: RGB, in the bytes of the file.
        image: what the video continues (image-to-video).
    """

    path: Path
    prompt: SuitePrompt
    frames: Frames
    fps: float
    image: Path | None = None


@dataclass(frozen=True)
class Measured:
    """A formula's result.

    Attributes:
        value: VBench's `video_results`.
        weight: of the video in the dimension's score; some of VBench's means are over frames.
    """

    value: float | bool
    weight: float = 1.0


def need_frames(footage: Footage, least: int) -> None:
    if (count := len(footage.frames)) < least:
        raise DimensionError(f"{footage.path} has too few frames, {count}; this dimension needs {least}")


def similarity(a: Float[Tensor, "_ dim"], b: Float[Tensor, "_ dim"]) -> Float[Tensor, "frames"]:
    """cos+, row by row."""
    return cosine_similarity(a, b, dim=-1).clamp(min=0).double()


def consistency(encoder: Encoder, footage: Footage) -> Measured:
    """mean over t >= 1 of (cos+(f_t, f_{t-1}) + cos+(f_t, f_0))/2; weighted by those frames."""
    need_frames(footage, 2)
    features = encoder.frames(footage.frames)
    both = similarity(features[1:], features[:-1]) + similarity(features[1:], features[:1])
    return Measured(float(both.mean() / 2), weight=len(features) - 1)


def continuation(encoder: Encoder, footage: Footage) -> Measured:
    """.4 max_t cos+(f_t, f) + .3 mean_{t >= 1} cos+(f_t, f_{t-1}) + .3 min_{t >= 1} cos+(f_t, f_{t-1})."""
    need_frames(footage, 2)
    if footage.image is None:
        raise DimensionError(f"{footage.path} continues no image; give the suite's images (--suite, --images)")
    with Image.open(footage.image) as opened:
        image = encoder.picture(opened)
    features = encoder.frames(footage.frames)
    between = similarity(features[1:], features[:-1])
    return Measured(float(0.4 * similarity(features, image).max() + 0.3 * between.mean() + 0.3 * between.min()))


def mean_points(encoder: Encoder, footage: Footage) -> Measured:
    """The mean over frames of a network's points."""
    return Measured(float(encoder.frames(footage.frames).double().mean()))


def appearance(encoder: Encoder, footage: Footage) -> Measured:
    """exp(scale) cos(frame, style)/100 with the style that the suite's entry names; weighted by frames."""
    styles = footage.prompt.info.get("auxiliary_info", {}).get("appearance_style", {})
    if "appearance_style" not in styles:
        raise DimensionError(
            f"the suite names no style for {footage.prompt.text!r}: appearance_style is measured on VBench's own list"
        )
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in footage.frames]
    logits = torch.cat([encoder.picture(picture, styles["appearance_style"]) for picture in pictures])
    return Measured(float((logits.double() / 100).mean()), weight=len(logits))


def likeness(compare: Callable[[Footage], float], footage: Footage) -> Measured:
    """cos(video, prompt)."""
    return Measured(compare(footage))


def flickering(_: None, footage: Footage) -> Measured:
    """(255 - mean_t mean |I_{t+1} - I_t|)/255 with inner means in fp32: VBench's number to the last digit."""
    need_frames(footage, 2)
    levels = (frame.astype(np.float32) for frame in footage.frames.permute(0, 2, 3, 1).numpy())
    differences = np.array([np.abs(after - before).mean() for before, after in pairwise(levels)])
    return Measured((255.0 - float(differences.mean())) / 255.0)


def dynamic_degree(pairs: Callable[[Frames], list[bool]], footage: Footage) -> Measured:
    """Whether round(4 T/16) or more pairs of T frames, 8 a second, move faster than 6/256 of the shorter side."""
    frames = footage.frames[:: max(1, round(footage.fps / FLOW_FPS))]
    faster = pairs(frames)
    return Measured(bool(faster) and sum(faster) >= round(4 * len(frames) / 16))


def smoothness(interpolate: Callable[[Picture, Picture], Picture], footage: Footage) -> Measured:
    """(255 - mean |I_odd - I'|)/255, where I' is interpolated between the even frames on both sides and cut to bytes.

    VBench interpolates smaller frames where a GPU's memory is short; this never does.
    """
    need_frames(footage, 3)
    even, errors = footage.frames[::2], []
    for before, middle, after in zip(even[:-1], footage.frames[1::2], even[1:], strict=False):  # one may be left over
        made = interpolate(before[None].float() / 255, after[None].float() / 255)
        cut = (made[0] * 255).clamp(0, 255).to(torch.uint8)
        errors.append(float((cut.int() - middle.int()).abs().double().mean()))
    return Measured((255.0 - float(np.mean(errors))) / 255.0)


def camera_motion(track: Callable[[Frames], Tracks], footage: Footage) -> Measured:
    """Whether the centres of the four edges moved from the first frame to the last as the prompt asks."""
    known = list(dict.fromkeys(TOP_BOTTOM.values()))
    requested = [motion for motion in known if motion in footage.prompt.text]
    if not requested:
        raise DimensionError(f"{footage.prompt.text!r} asks for none of: {', '.join(known)}")
    found = track(footage.frames)
    return Measured(requested[0] in motions(found[-1] - found[0], min(footage.frames.shape[-2:])))


def motions(moved: Int[Tensor, "10 10 2"], shorter: int) -> set[str]:
    """Camera motions that the movement of a grid of points shows; empty where it shows none."""
    middle, last = GRID // 2, GRID - 1
    top, bottom, left, right = (
        directions(moved[row, column].tolist(), shorter * STILL)
        for row, column in ((0, middle), (last, middle), (middle, 0), (middle, last))
    )
    shown = [TOP_BOTTOM.get(pair) for pair in product(top, bottom)]
    shown += [LEFT_RIGHT.get(pair) for pair in product(left, right)]
    found = {motion for motion in shown if motion is not None}
    return found - {STATIC} if len(found) > 1 else found


def directions(vector: list[int], still: float) -> list[str]:
    """Of one point, horizontally and vertically; y grows downwards."""
    x, y = vector
    found = ["right"] * (x > still) + ["left"] * (x < -still) + ["down"] * (y > still) + ["up"] * (y < -still)
    return found or ["static"]
