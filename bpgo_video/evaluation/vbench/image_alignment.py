"""Does the video continue its image, and move as asked? VBench-I2V's dimensions (arXiv 2411.13503).

    .4 max_t cos+(f_t, f) + .3 mean_{t >= 1} cos+(f_t, f_{t-1}) + .3 min_{t >= 1} cos+(f_t, f_{t-1})

f is of the image that was to be continued, by DINO for the subject and by DreamSim for the background.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bpgo_video.evaluation.vbench.dimension import Dimension, DimensionError, Footage, Measured, Sources
from bpgo_video.evaluation.vbench.encoders import DINO_B16, adopt_encoder, dino, efficientnet
from bpgo_video.evaluation.vbench.pixels import DINO_OF_IMAGES, DREAMSIM, Encoder, Frames

GRID = 10  # points a side that are followed
STILL = 0.005  # of the shorter side: a point that moved less stands
MOTIONS = {  # what a prompt asks for
    "camera pans left": "pan_left",
    "camera pans right": "pan_right",
    "camera tilts up": "tilt_up",
    "camera tilts down": "tilt_down",
    "camera zooms in": "zoom_in",
    "camera zooms out": "zoom_out",
    "camera static": "static",
}
ALIKE = {  # two opposite edges' directions, where they tell a motion
    ("left", "left"): "pan_right",
    ("right", "right"): "pan_left",
    ("down", "down"): "tilt_up",
    ("up", "up"): "tilt_down",
    ("static", "static"): "static",
}
TOP_BOTTOM = {**ALIKE, ("up", "down"): "zoom_in", ("down", "up"): "zoom_out"}
LEFT_RIGHT = {**ALIKE, ("left", "right"): "zoom_in", ("right", "left"): "zoom_out"}

Tracks = Callable[[Frames], Int[Tensor, "frames 10 10 2"]]  # where grid points are in each frame, whole pixels (x, y)


def continuation(encoder: Encoder, footage: Footage) -> Measured:
    """VBench-I2V's order statistics."""
    with footage.opened_image() as opened:
        image = encoder.picture(opened)
    features = encoder.frames(footage.frames)
    if len(features) < 2:
        raise DimensionError(f"{footage.path} has one frame; continuation compares frames")
    to_image = cosine_similarity(features, image, dim=-1).clamp(min=0).double()
    between = cosine_similarity(features[1:], features[:-1], dim=-1).clamp(min=0).double()
    return Measured(float(0.4 * to_image.max() + 0.3 * between.mean() + 0.3 * between.min()))


def camera_motion(tracks: Tracks, footage: Footage) -> Measured:
    """Whether the middles of the four edges moved from the first frame to the last as the prompt asks."""
    asked = [motion for words, motion in MOTIONS.items() if words in footage.prompt.text]
    if not asked:
        raise DimensionError(f"{footage.prompt.text!r} asks for none of: {', '.join(MOTIONS)}")
    found = tracks(footage.frames)
    return Measured(asked[0] in motions(found[-1] - found[0], min(footage.frames.shape[-2:])))


def motions(moved: Int[Tensor, "10 10 2"], shorter: int) -> set[str]:
    """Camera motions that the movement of a grid of points tells; empty where it tells none."""
    middle, last = GRID // 2, GRID - 1
    top, bottom, left, right = (
        directions(moved[row, column].tolist(), shorter * STILL)
        for row, column in ((0, middle), (last, middle), (middle, 0), (middle, last))
    )
    pairs = [TOP_BOTTOM.get(pair) for pair in product(top, bottom)] + [
        LEFT_RIGHT.get(pair) for pair in product(left, right)
    ]
    found = {motion for motion in pairs if motion is not None}
    return found - {"static"} if len(found) > 1 else found


def directions(vector: list[int], still: float) -> list[str]:
    """Of one point, horizontally and vertically; y grows downwards."""
    x, y = vector
    found = ["right"] * (x > still) + ["left"] * (x < -still) + ["down"] * (y > still) + ["up"] * (y < -still)
    return found or ["static"]


def adopt_tracks(built: Any, sources: Sources) -> Tracks:
    """A user's point tracking, of which grid points are followed.

    It takes a video of 0 to 255 on the device, (1, frames, 3, height, width), and the points a side, 10, and gives
    (1, frames, 100, 2): x and y, row by row.
    """

    @torch.no_grad()
    def tracks(frames: Frames) -> Tensor:
        found = built(frames[None].float().to(sources.device), GRID)
        return found[0].long().cpu().unflatten(1, (GRID, GRID))

    return tracks


I2V_SUBJECT = Dimension(
    continuation,
    default=DINO_B16,
    named={"efficientnet": efficientnet},
    folder=partial(dino, DINO_OF_IMAGES),
    adopt=partial(adopt_encoder, DINO_OF_IMAGES),
)
I2V_BACKGROUND = Dimension(
    continuation,
    named={"efficientnet": efficientnet},
    adopt=partial(adopt_encoder, DREAMSIM),
    usual="DreamSim",
)
CAMERA_MOTION = Dimension(camera_motion, adopt=adopt_tracks, usual="point tracking (VBench's is CoTracker2)")
