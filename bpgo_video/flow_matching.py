"""How does a policy learn from videos? It sees them mixed with noise, and is asked for the way from one to the other.

    x_sigma = (1 - sigma) x + sigma eps,    loss = |v(x_sigma, sigma) - (eps - x)|^2, the mean over latent dimensions

Rectified flow (arXiv 2209.03003). Levels are drawn from a density of DENSITIES and then shifted as the family's schedule
is. All draws are keyed: they depend on the step and the clip, never on the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpgo_video.randomness import generator_of, keyed_noise
from bpgo_video.types import Conditioning, Latents, Velocity

Density = Callable[[torch.Generator, float, float], Tensor]


def uniform(generator: torch.Generator, mean: float, std: float) -> Float[Tensor, ""]:
    """Evenly in [0, 1); mean and std have no effect."""
    return torch.rand((), generator=generator)


def logit_normal(generator: torch.Generator, mean: float, std: float) -> Float[Tensor, ""]:
    """sigmoid(u), u normal: most levels in the middle (SD3, arXiv 2403.03206)."""
    return torch.sigmoid(mean + std * torch.randn((), generator=generator))


DENSITIES: dict[str, Density] = {"uniform": uniform, "logit_normal": logit_normal}


@dataclass(frozen=True)
class Draws:
    """What chance decides for each clip of a micro-batch.

    Attributes:
        levels: of noise, in [0, 1], before the family's shift.
        noise: eps.
        drops: whose caption is left out, so that the policy learns to be guided.
    """

    levels: Float[Tensor, "samples"]
    noise: Latents
    drops: Bool[Tensor, "samples"]


@dataclass(frozen=True)
class Chances:
    """How noise levels and left-out captions are drawn; a name of DENSITIES, and the share of captions."""

    density: str
    mean: float
    std: float
    caption_dropout: float

    def draw(self, keys: Sequence[tuple[int | str, ...]], shape: Sequence[int], device: torch.device) -> Draws:
        """One row per key.

        Args:
            shape: of one clip's latents.
        """
        generators = [generator_of(*key, "level") for key in keys]
        levels = [DENSITIES[self.density](generator, self.mean, self.std) for generator in generators]
        drops = [float(torch.rand((), generator=generator)) < self.caption_dropout for generator in generators]
        noise = keyed_noise(shape, [(*key, "noise") for key in keys], device)
        return Draws(torch.stack(levels).to(device), noise, torch.tensor(drops, device=device))


def noised(data: Latents, noise: Latents, sigma: Float[Tensor, "samples"]) -> Latents:
    """(1 - sigma) data + sigma noise, each sample at its own level."""
    level = sigma.view(-1, 1, 1, 1, 1)
    return (1 - level) * data + level * noise


def matching_error(velocity: Velocity, target: Velocity) -> Float[Tensor, "samples"]:
    """|v - target|^2 of each sample, the mean over latent dimensions."""
    return (velocity - target).square().flatten(1).mean(dim=1)


def without_captions(
    conditioning: Conditioning, negative: Conditioning, drops: Bool[Tensor, "samples"]
) -> dict[str, Tensor]:
    """The conditioning with the negative prompt's in the rows of `drops`; what that lacks, an image's, is kept."""
    return {
        name: torch.where(drops.view(-1, *[1] * (value.ndim - 1)), negative[name].to(value), value)
        if name in negative
        else value
        for name, value in conditioning.items()
    }
