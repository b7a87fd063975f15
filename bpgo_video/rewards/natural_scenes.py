"""Statistics of natural scenes, which BRISQUE and NIQE are made of.

A picture less its local mean, over its local deviation, and the products of neighbours in it have, in a photograph, an
asymmetric generalised Gaussian distribution; blur, noise and blocks change its shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from einops import rearrange
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

Picture = Float[Tensor, "frames height width"]  # brightness in [0, 255]
RADIUS, SIGMA = 3, 7 / 6  # of the local window, in pixels
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # neighbours: right, below, on both diagonals
ALPHAS = (0.2, 10.0, 0.001)  # lowest and highest shape of the table, and its step
TINY = 1e-12  # keeps the statistics of a picture of one colour finite


@dataclass(frozen=True)
class Shape:
    """Maximum-moment fit of an asymmetric generalised Gaussian (alpha = 2 is a Gaussian's, 1 Laplace's).

    Attributes:
        alpha: shape.
        left, right: root mean square of the negative and of the other values.
        ratio: sqrt(Gamma(1/alpha) / Gamma(3/alpha)), which turns these into the distribution's scales.
        mean: (right - left) ratio Gamma(2/alpha) / Gamma(1/alpha), the distribution's.
    """

    alpha: Float[Tensor, "*rows"]
    left: Float[Tensor, "*rows"]
    right: Float[Tensor, "*rows"]

    @property
    def ratio(self) -> Float[Tensor, "*rows"]:
        return (0.5 * (torch.lgamma(1 / self.alpha) - torch.lgamma(3 / self.alpha))).exp()

    @property
    def mean(self) -> Float[Tensor, "*rows"]:
        share = (torch.lgamma(2 / self.alpha) - torch.lgamma(1 / self.alpha)).exp()
        return (self.right - self.left) * self.ratio * share


def luma(images: Float[Tensor, "frames 3 height width"]) -> Picture:
    """Brightness in [0, 255] of RGB in [0, 1] (BT.601)."""
    return 255 * torch.einsum("fchw,c->fhw", images, images.new_tensor([0.299, 0.587, 0.114]))


def brisque_statistics(picture: Picture) -> Float[Tensor, "frames 36"]:
    """18 at each of two sizes."""
    sizes = []
    for scaled in (picture, halved(picture)):
        itself, *products = shapes(contrast_normalised(scaled))
        columns = [itself.alpha, (itself.left**2 + itself.right**2) / 2]
        for product in products:
            columns += [product.alpha, product.mean, product.left**2, product.right**2]
        sizes.append(torch.stack(columns, dim=1))
    return torch.cat(sizes, dim=1)


def niqe_statistics(picture: Picture, patch: int) -> Float[Tensor, "frames patches 36"]:
    """18 of each whole patch at each of two sizes.

    Both diagonals have the left scale twice, in place of the right one, as the published mean and covariance have.
    """
    height, width = (side // patch * patch for side in picture.shape[-2:])
    picture, sizes = picture[:, :height, :width], []
    for scaled, side in ((picture, patch), (halved(picture), patch // 2)):
        patches = rearrange(contrast_normalised(scaled), "f (y h) (x w) -> (f y x) h w", h=side, w=side)
        itself, *products = shapes(patches)
        columns = [itself.alpha, itself.ratio * (itself.left + itself.right) / 2]
        for index, product in enumerate(products):
            second = product.right if index < 2 else product.left
            columns += [product.alpha, product.mean, product.ratio * product.left, product.ratio * second]
        sizes.append(torch.stack(columns, dim=1).unflatten(0, (len(picture), -1)))
    return torch.cat(sizes, dim=2)


def halved(picture: Picture) -> Float[Tensor, "frames half_height half_width"]:
    """Half the size (bicubic, antialiased)."""
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


def shapes(normalised: Float[Tensor, "frames height width"]) -> list[Shape]:
    """Of the picture itself and of its products with each neighbour; neighbours wrap around at the edges."""
    products = [normalised * normalised.roll(shift, dims=(1, 2)) for shift in SHIFTS]
    return [fit(values.flatten(1)) for values in (normalised, *products)]


def fit(values: Float[Tensor, "frames pixels"]) -> Shape:
    """Of each row (Lasmar, Stitou and Berthoumieu, ICIP 2009): alpha solves rho(alpha) = R."""
    squares, negative = values**2, values < 0
    left, right = (
        ((squares * side).sum(dim=1) / side.sum(dim=1).clamp(min=1)).sqrt() for side in (negative, ~negative)
    )
    gamma = left.double() / right.clamp(min=TINY)  # its fourth power leaves fp32 where no value is positive
    r = values.abs().mean(dim=1) ** 2 / squares.mean(dim=1).clamp(min=TINY)
    big_r = r * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2
    return Shape(_alpha_of(big_r).to(values.dtype), left, right)


def _alpha_of(big_r: Float64[Tensor, "frames"]) -> Float64[Tensor, "frames"]:
    """Inverse of rho(alpha) = Gamma(2/alpha)^2 / (Gamma(1/alpha) Gamma(3/alpha)), which grows with alpha."""
    alphas, rhos = (column.to(big_r.device) for column in _table())
    above = torch.searchsorted(rhos, big_r).clamp(1, len(rhos) - 1)
    low, high = rhos[above - 1], rhos[above]
    share = ((big_r - low) / (high - low)).clamp(0, 1)
    return torch.lerp(alphas[above - 1], alphas[above], share)


@cache
def _table() -> tuple[Tensor, Tensor]:
    alphas = torch.arange(*ALPHAS, dtype=torch.float64)
    gammas = [torch.lgamma(n / alphas) for n in (1, 2, 3)]
    return alphas, (2 * gammas[1] - gammas[0] - gammas[2]).exp()
