"""How does a frame become what a network reads? Resized, cut or padded, normalised: in torch, with gradients.

Resizing is antialiased with PIL's kernels (bicubic with a = -.5), on floats: without PIL's rounding to 8 bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.functional import pad as pad_edges

from bpgo_video.rewards.backbones import Backbone
from bpgo_video.rewards.base import Clips

FRAMES_AT_ONCE = 64
MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers of its filters
Images = Float[Tensor, "images 3 height width"]
Fitted = Float[Tensor, "images 3 rows columns"]


@dataclass(frozen=True)
class Preprocessing:
    """How images in [0, 1] become a network's input.

    Attributes:
        fit: name in `FITS`.
        size: height and width of the input.
        edge: `crop` only, the shorter side before the cut.
        mode: bicubic or bilinear.
        mean, std: per channel.
    """

    fit: str
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"
    edge: int = 0

    def __call__(self, images: Images) -> Fitted:
        fitted = FITS[self.fit](images.float(), self)
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (fitted - mean) / std

    @classmethod
    def of_folder(cls, folder: Path) -> Preprocessing:
        """As the folder's preprocessor_config.json (of a video model: video_preprocessor_config.json) says.

        Raises:
            FileNotFoundError: it has neither.
            ValueError: the resampling filter is neither bilinear nor bicubic, or is not stated.
        """
        config = read_config(folder)
        size, crop = config["size"], config.get("crop_size")
        mode = MODES.get(config.get("resample", -1))
        if mode is None:
            raise ValueError(
                f"{folder}: resample = {config.get('resample')} in its preprocessor config; must be one of {MODES}"
            )
        does_crop = config.get("do_center_crop", crop is not None)
        normalises = config.get("do_normalize", True)
        return cls(
            fit="crop" if does_crop else "stretch",
            size=_sides(crop or size if does_crop else size),
            mean=tuple(config["image_mean"]) if normalises else (0.0, 0.0, 0.0),
            std=tuple(config["image_std"]) if normalises else (1.0, 1.0, 1.0),
            mode=mode,
            edge=min(_sides(size)) if does_crop else 0,
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's video_preprocessor_config.json, or preprocessor_config.json."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text("utf-8"))
    raise FileNotFoundError(f"{folder} has no preprocessor_config.json; it says how frames become the model's input")


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    edge = size.get("shortest_edge", 0)
    return size.get("height", edge), size.get("width", edge)


def resize(images: Images, size: tuple[int, int], mode: str = "bicubic") -> Fitted:
    if tuple(images.shape[-2:]) == size:
        return images
    return interpolate(images, size, mode=mode, antialias=True).clamp(0, 1)


def crop(images: Images, plan: Preprocessing) -> Fitted:
    """Shorter side to `edge`, then the middle."""
    shorter = min(images.shape[-2:])
    height, width = (plan.edge * side // shorter for side in images.shape[-2:])
    resized = resize(images, (height, width), plan.mode)
    top, left = (height - plan.size[0]) // 2, (width - plan.size[1]) // 2
    return resized[..., top : top + plan.size[0], left : left + plan.size[1]]


def pad(images: Images, plan: Preprocessing) -> Fitted:
    """Longer side to the size (a square), black around the middle."""
    side, longer = plan.size[0], max(images.shape[-2:])
    height, width = (round(length * side / longer) for length in images.shape[-2:])
    top, left = (side - height) // 2, (side - width) // 2
    edges = (left, side - width - left, top, side - height - top)
    return pad_edges(resize(images, (height, width), plan.mode), edges)


def stretch(images: Images, plan: Preprocessing) -> Fitted:
    return resize(images, plan.size, plan.mode)


FITS: dict[str, Callable[[Images, Preprocessing], Fitted]] = {"crop": crop, "pad": pad, "stretch": stretch}


def frame_features(
    clips: Clips,
    indices: Sequence[int],
    backbone: Backbone,
    preprocessing: Preprocessing,
    encode: Callable[[Tensor], Tensor],
) -> Float[Tensor, "samples scored dim"]:
    """`encode` of the chosen frames, fp32: once for all rewards that read this network in this way.

    No more than FRAMES_AT_ONCE frames are copied, resized and encoded at a time: 8 clips of 81 frames at 480x832 would
    be 3.1 GB a copy in fp32.
    """

    def compute() -> Tensor:
        pairs = torch.cartesian_prod(torch.arange(len(clips)), torch.tensor(indices))
        rows = []
        for chosen in pairs.split(FRAMES_AT_ONCE):
            frames = clips.videos[chosen[:, 0], chosen[:, 1]].to(backbone.device)
            rows.append(encode(preprocessing(frames).to(backbone.dtype)).float())
        return torch.cat(rows).unflatten(0, (len(clips), len(indices)))

    return clips.once((backbone.key, preprocessing, tuple(indices)), compute)


def video_features(
    clips: Clips,
    indices: Sequence[int],
    backbone: Backbone,
    preprocessing: Preprocessing,
    encode: Callable[[Tensor, slice], Tensor],
) -> Float[Tensor, "samples ..."]:
    """`encode(pixels, rows)` of the chosen frames of some rows at a time, FRAMES_AT_ONCE frames or one video, fp32."""
    at_once = max(1, FRAMES_AT_ONCE // len(indices))
    found = []
    for start in range(0, len(clips), at_once):
        rows = slice(start, min(start + at_once, len(clips)))
        frames = clips.videos[rows][:, list(indices)].to(backbone.device)
        pixels = preprocessing(frames.flatten(0, 1)).to(backbone.dtype)
        found.append(encode(pixels.unflatten(0, frames.shape[:2]), rows).float())
    return torch.cat(found)


def spread(count: int, total: int) -> list[int]:
    """Exactly `count` frames over a video, its ends among them, for networks of a fixed length; a short one repeats."""
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]
