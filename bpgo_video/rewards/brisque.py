"""How far is each frame from a clean picture, by eye? BRISQUE (Mittal, Moorthy and Bovik, TIP 2012)."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores
from bpgo_video.rewards.natural_scenes import Shape, contrast_normalised, halved, luma, shapes
from bpgo_video.rewards.packaged import data_of, release

FRAMES_AT_ONCE = 8


class Brisque:
    """Distortion per frame: about 0 for a clean photograph, 100 for a ruined one; unbounded, lower is better.

    A support vector regression on 36 statistics, trained on people's opinions of the LIVE database. Its parameters come
    with the package brisque (Apache-2.0); the statistics are computed here, in torch.

    Args:
        frames: how many frames are scored, spread evenly; None scores all.
    """

    name = "brisque"
    range = (-math.inf, math.inf)
    higher_is_better = False
    differentiable = False
    kind = "real"

    def __init__(self, frames: int | None = None, device: torch.device | str = "cpu"):
        self.frames = FrameSampling(frames)
        self.regression = Regression(data_of("brisque", "models/svm.txt"), torch.device(device))
        self.low, self.high = _feature_ranges(data_of("brisque", "models/normalize.pickle"), torch.device(device))
        self.version = f"{release('brisque')}-{self.frames}"

    @torch.no_grad()
    def __call__(self, clips: Clips) -> FrameScores:
        indices = self.frames.indices(clips.videos.shape[1], clips.fps)
        chosen = clips.videos[:, indices].to(self.low.device)
        scores = [self.score(frames.float()) for frames in chosen.flatten(0, 1).split(FRAMES_AT_ONCE)]
        return FrameScores(torch.cat(scores).unflatten(0, chosen.shape[:2]), clips.times[indices])

    def score(self, frames: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames"]:
        features = statistics(luma(frames))
        return self.regression(2 * (features - self.low) / (self.high - self.low) - 1)


def statistics(picture: Float[Tensor, "frames height width"]) -> Float[Tensor, "frames 36"]:
    """18 at each of two sizes."""
    return torch.cat([_at_one_size(picture), _at_one_size(halved(picture))], dim=1)


def _at_one_size(picture: Float[Tensor, "frames height width"]) -> Float[Tensor, "frames 18"]:
    itself, *products = shapes(contrast_normalised(picture))
    columns = [itself.alpha, (itself.left**2 + itself.right**2) / 2]
    return torch.stack([*columns, *(column for product in products for column in _of_product(product))], dim=1)


def _of_product(shape: Shape) -> tuple[Tensor, ...]:
    return shape.alpha, shape.mean, shape.left**2, shape.right**2


class Regression:
    """sum_i c_i exp(-gamma |x - s_i|^2) - rho, from the text file of libsvm."""

    def __init__(self, file: Path, device: torch.device):
        head, _, body = file.read_text("utf-8").partition("\nSV\n")
        settings = dict(line.split(maxsplit=1) for line in head.splitlines())
        self.gamma, self.rho = float(settings["gamma"]), float(settings["rho"])
        rows = [line.split() for line in body.splitlines()]
        vectors = [[float(field.partition(":")[2]) for field in fields] for _, *fields in rows]
        self.coefficients = torch.tensor([float(row[0]) for row in rows], device=device)
        self.vectors = torch.tensor(vectors, device=device)

    def __call__(self, features: Float[Tensor, "frames features"]) -> Float[Tensor, "frames"]:
        distances = (features[:, None] - self.vectors).square().sum(dim=-1)
        return (-self.gamma * distances).exp() @ self.coefficients - self.rho


class _NumbersAlone(pickle.Unpickler):
    """Of a file that should hold lists of numbers."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a file of numbers names {module}.{name}; it is not what the package ships")


def _feature_ranges(file: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lowest and highest of each statistic in the regression's training."""
    with file.open("rb") as stream:
        ranges = _NumbersAlone(stream).load()
    low, high = (torch.from_numpy(np.array(ranges[key], dtype=np.float32)).to(device) for key in ("min_", "max_"))
    return low, high
