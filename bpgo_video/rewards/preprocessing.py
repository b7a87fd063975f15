"""Preprocessing of frames: resized, cropped or padded, and normalised, in torch and with gradients.

Resizing is antialiased with PIL's kernels (bicubic with a = -.5), on floats: without PIL's rounding to 8 bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.functional import pad as pad_edges

MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers of its filters
Images = Float[Tensor, "images 3 height width"]
Fitted = Float[Tensor, "images 3 rows columns"]


@dataclass(frozen=True)
class Preprocessing:
    """How images in [0, 1] become a network's input.

    Attributes:
        fit: name in `FITS`.
        size: height and width of the input.
        edge: `crop` only, the shorter side before the crop.
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
        """Of the folder's preprocessor config.

        Raises:
            FileNotFoundError: it has none.
            ValueError: the resampling filter is neither bilinear nor bicubic, or is not stated.
        """
        config = read_config(folder)
        size, crop = config["size"], config.get("crop_size")
        resample = config.get("resample")
        if resample not in MODES:
            raise ValueError(f"{folder}: resample = {resample} in its preprocessor config; must be one of {MODES}")
        crops = config.get("do_center_crop", crop is not None)
        normalises = config.get("do_normalize", True)
        return cls(
            fit="crop" if crops else "stretch",
            size=_sides(crop or size if crops else size),
            mean=tuple(config["image_mean"]) if normalises else (0.0, 0.0, 0.0),
            std=tuple(config["image_std"]) if normalises else (1.0, 1.0, 1.0),
            mode=MODES[resample],
            edge=min(_sides(size)) if crops else 0,
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's video_preprocessor_config.json, or preprocessor_config.json."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text("utf-8"))
    raise FileNotFoundError(f"{folder} has no preprocessor_config.json, which states how frames become the input")


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
    """Shorter side to `edge`, then the centre."""
    shorter = min(images.shape[-2:])
    height, width = (plan.edge * side // shorter for side in images.shape[-2:])
    top, left = (height - plan.size[0]) // 2, (width - plan.size[1]) // 2
    resized = resize(images, (height, width), plan.mode)
    return resized[..., top : top + plan.size[0], left : left + plan.size[1]]


def pad(images: Images, plan: Preprocessing) -> Fitted:
    """Longer side to the size (a square), centred on black."""
    side, longer = plan.size[0], max(images.shape[-2:])
    height, width = (round(length * side / longer) for length in images.shape[-2:])
    top, left = (side - height) // 2, (side - width) // 2
    edges = (left, side - width - left, top, side - height - top)
    return pad_edges(resize(images, (height, width), plan.mode), edges)


def stretch(images: Images, plan: Preprocessing) -> Fitted:
    return resize(images, plan.size, plan.mode)


FITS: dict[str, Callable[[Images, Preprocessing], Fitted]] = {"crop": crop, "pad": pad, "stretch": stretch}
