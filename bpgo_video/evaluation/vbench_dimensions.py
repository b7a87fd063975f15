"""VBench's dimensions: a formula and a network map one video to one number.

The papers are arXiv 2311.17982 (VBench) and 2411.13503 (VBench-I2V). cos+ is max(0, cos), f_t the feature of frame t, f
that of the image which the video continues.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bpgo_video.errors import InputError
from bpgo_video.evaluation import vbench_networks as networks
from bpgo_video.evaluation.vbench_files import BENCHMARKS
from bpgo_video.evaluation.vbench_networks import GRID, Encoder, Footage, Network, Sources

Picture = networks.Picture

FLOW_FPS = 8  # frames per second that dynamic degree compares
STILL = 0.005  # of the shorter side: a point that moved less is static
STATIC, ZOOM_IN, ZOOM_OUT = "camera static", "camera zooms in", "camera zooms out"
ALIKE = {  # directions of two opposite edges -> camera motion in the words of a prompt
    ("right", "right"): "camera pans left",
    ("left", "left"): "camera pans right",
    ("down", "down"): "camera tilts up",
    ("up", "up"): "camera tilts down",
    ("static", "static"): STATIC,
}
TOP_BOTTOM = {**ALIKE, ("up", "down"): ZOOM_IN, ("down", "up"): ZOOM_OUT}
LEFT_RIGHT = {**ALIKE, ("left", "right"): ZOOM_IN, ("right", "left"): ZOOM_OUT}


class DimensionError(InputError):
    """A dimension cannot be measured; the message states what it needs."""


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
    """exp(scale) cos(frame, style)/100 with the style of the suite's entry; weighted by frames."""
    styles = footage.prompt.info.get("auxiliary_info", {}).get("appearance_style", {})
    if "appearance_style" not in styles:
        raise DimensionError(
            f"the suite has no style for {footage.prompt.text!r}: appearance_style needs VBench's own list as --suite"
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


def dynamic_degree(pairs: Callable[[networks.Frames], list[bool]], footage: Footage) -> Measured:
    """Whether round(4 T/16) or more pairs of T frames, 8 per second, move faster than 6/256 of the shorter side."""
    frames = footage.frames[:: max(1, round(footage.fps / FLOW_FPS))]
    faster = pairs(frames)
    return Measured(bool(faster) and sum(faster) >= round(4 * len(frames) / 16))


def smoothness(interpolate: Callable[[Picture, Picture], Picture], footage: Footage) -> Measured:
    """(255 - mean |I_odd - I'|)/255, where I' is interpolated between the two neighbouring frames and cut to bytes.

    VBench interpolates smaller frames if a GPU's memory is short; this never does.
    """
    need_frames(footage, 3)
    even, errors = footage.frames[::2], []
    for before, middle, after in zip(even[:-1], footage.frames[1::2], even[1:], strict=False):  # one may be left over
        between = interpolate(before[None].float() / 255, after[None].float() / 255)
        cut = (between[0] * 255).clamp(0, 255).to(torch.uint8)
        errors.append(float((cut.int() - middle.int()).abs().double().mean()))
    return Measured((255.0 - float(np.mean(errors))) / 255.0)


def camera_motion(track: Callable[[networks.Frames], networks.Tracks], footage: Footage) -> Measured:
    """Whether the centres of the four edges moved from the first frame to the last as the prompt says."""
    known = list(dict.fromkeys(TOP_BOTTOM.values()))
    requested = [motion for motion in known if motion in footage.prompt.text]
    if not requested:
        raise DimensionError(f"{footage.prompt.text!r} has no camera motion; VBench knows {', '.join(known)}")
    points = track(footage.frames)
    return Measured(requested[0] in motions(points[-1] - points[0], min(footage.frames.shape[-2:])))


def motions(moved: Int[Tensor, "10 10 2"], shorter: int) -> set[str]:
    """Camera motions that explain the movement of a grid of points; may be empty."""
    middle, last = GRID // 2, GRID - 1
    top, bottom, left, right = (
        directions(moved[row, column].tolist(), shorter * STILL)
        for row, column in ((0, middle), (last, middle), (middle, 0), (middle, last))
    )
    candidates = [TOP_BOTTOM.get(pair) for pair in product(top, bottom)]
    candidates += [LEFT_RIGHT.get(pair) for pair in product(left, right)]
    shown = {motion for motion in candidates if motion is not None}
    return shown - {STATIC} if len(shown) > 1 else shown


def directions(vector: list[int], still: float) -> list[str]:
    """Of one point, horizontally and vertically; y grows downwards."""
    x, y = vector
    moves = {"right": x > still, "left": x < -still, "down": y > still, "up": y < -still}
    return [direction for direction, is_move in moves.items() if is_move] or ["static"]


@dataclass(frozen=True)
class Dimension:
    """One dimension.

    Attributes:
        formula: of a network's `call` and a video.
        adapt: turns what a user's factory returned into a `call`; None: the formula needs no network.
        load: builds a network from a folder, a file or a hub id.
        default: the network without --backbone; None: the user must name one.
        short: networks by short name.
        usual: VBench's own network, for messages.
        scale: of the dimension's score relative to the videos' results.
        continues: the videos are compared with the image that they continue.
    """

    name: str
    formula: Callable[[Any, Footage], Measured]
    adapt: Callable[[Any, Sources], Any] | None = None
    load: Callable[[str, Sources], Network] | None = None
    default: str | None = None
    short: Mapping[str, Callable[[str, Sources], Network]] = field(default_factory=dict)
    usual: str = ""
    scale: float = 1.0
    continues: bool = False

    def network(self, requested: str | None, sources: Sources) -> Network:
        """The requested network, or the default one.

        Raises:
            DimensionError: none is requested and there is no default; or it cannot be built.
        """
        if self.adapt is None:
            if requested is not None:
                raise DimensionError(f"{self.name} needs no network; remove --backbone {self.name}={requested}")
            return Network(None, "exact", "none")
        spec = requested or self.default
        kinds = [*self.short, *(["FOLDER, FILE or hub id"] if self.load else []), "my_pkg.module:build"]
        usage = f"--backbone {self.name}={' | '.join(kinds)}"
        if spec is None:
            raise DimensionError(f"{self.name} needs {self.usual}: {usage}")
        build = self.short.get(spec) or (self.from_factory if is_dotted(spec) else self.load)
        if build is None:
            raise DimensionError(f"{self.name}: {spec!r} is not one of its networks; {usage}")
        try:
            return build(spec, sources)
        except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
            raise DimensionError(
                f"{self.name}: the network {spec!r} could not be built: {type(error).__name__}: {error}; {usage}"
            ) from error

    def from_factory(self, spec: str, sources: Sources) -> Network:
        """A user's own network, by the dotted path of its factory."""
        assert self.adapt is not None
        module, _, attribute = spec.partition(":")
        factory = getattr(importlib.import_module(module), attribute)
        return Network(self.adapt(factory(str(sources.device)), sources), "native", spec)


def is_dotted(spec: str) -> bool:
    """Whether `spec` is `module:attribute`, not a path or package data."""
    module, _, attribute = spec.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


STAND_IN = {"efficientnet": networks.efficientnet}
VIDEO_TEXT: dict[str, Any] = {
    "adapt": networks.adapt_video_text,
    "load": networks.xclip,
    "usual": "ViCLIP, or X-CLIP as a proxy",
}

# fmt: off
ROWS = (
    Dimension("subject_consistency", consistency, networks.adapt_encoder(networks.DINO),
              partial(networks.dino, networks.DINO), networks.DINO_B16, STAND_IN),
    Dimension("background_consistency", consistency, networks.adapt_encoder(networks.CLIP),
              partial(networks.clip, "image"), networks.CLIP_B32, STAND_IN),
    Dimension("temporal_flickering", flickering),
    Dimension("motion_smoothness", smoothness, networks.adapt_interpolator,
              usual="a frame interpolation (VBench's is AMT-S)"),
    Dimension("dynamic_degree", dynamic_degree, networks.adapt_flow, None, "dis", {"dis": networks.dis}),
    Dimension("aesthetic_quality", mean_points, networks.adapt_embedding, partial(networks.clip, "points"),
              networks.CLIP_L14),
    Dimension("imaging_quality", mean_points, networks.adapt_points, networks.musiq, scale=0.01,
              usual="MUSIQ's weights (VBench's file is musiq_spaq_ckpt-358bb6af.pth)"),
    Dimension("appearance_style", appearance, networks.adapt_encoder(networks.CLIP), partial(networks.clip, "text"),
              networks.CLIP_B32),
    Dimension("temporal_style", likeness, **VIDEO_TEXT),
    Dimension("overall_consistency", likeness, **VIDEO_TEXT),
    Dimension("i2v_subject", continuation, networks.adapt_encoder(networks.DINO_OF_IMAGES),
              partial(networks.dino, networks.DINO_OF_IMAGES), networks.DINO_B16, STAND_IN, continues=True),
    Dimension("i2v_background", continuation, networks.adapt_encoder(networks.DREAMSIM),
              short=STAND_IN, usual="DreamSim", continues=True),
    Dimension("camera_motion", camera_motion, networks.adapt_tracker,
              usual="point tracking (VBench's is CoTracker2)"),
)
# fmt: on
DIMENSIONS = {dimension.name: dimension for dimension in ROWS}


def find_dimension(name: str) -> Dimension:
    """
    Raises:
        DimensionError: only VBench's own package measures it, or it is not a dimension.
    """
    if name in DIMENSIONS:
        return DIMENSIONS[name]
    if any(name in benchmark.dimensions for benchmark in BENCHMARKS.values()):
        raise DimensionError(f"only VBench's own package measures {name}: bpgo-video evaluate vbench")
    raise DimensionError(f"there is no dimension {name!r}; known dimensions are {', '.join(DIMENSIONS)}")
