"""How does a policy learn from videos? It sees them mixed with noise, and is asked for the way from one to the other.

    x_sigma = (1 - sigma) x + sigma eps,    loss = |v(x_sigma, sigma) - (eps - x)|^2, the mean over latent dimensions

Rectified flow (arXiv 2209.03003). Levels are drawn from a density of DENSITIES and placed on the family's schedule. All
draws are keyed: they depend on the step and the clip, never on the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpgo_video.randomness import generator_of, keyed_noise
from bpgo_video.types import Conditioning, Latents, Velocity

Key = tuple[int | str, ...]
MOST_DRAWS = 1000
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
        sigma: noise levels in [0, 1], on the CPU.
        noise: eps.
        drops: whose caption is left out, so that the policy learns to be guided.
    """

    sigma: Float[Tensor, "samples"]
    noise: Latents
    drops: Bool[Tensor, "samples"]


@dataclass(frozen=True)
class Chances:
    """How noise levels and left-out captions are drawn; a name of DENSITIES, and the share of captions."""

    density: str
    mean: float
    std: float
    caption_dropout: float

    def level(self, key: Key, schedule: Float[Tensor, "points"], accepts: Callable[[float], bool]) -> Tensor:
        """The first level drawn under a key that is accepted: the density, restricted to such levels."""
        generator = generator_of(*key, "level")
        for _ in range(MOST_DRAWS):
            found = on_schedule(DENSITIES[self.density](generator, self.mean, self.std), schedule)
            if accepts(float(found)):
                return found
        raise ValueError(
            f"none of {MOST_DRAWS} noise levels drawn from {self.density} (mean {self.mean}, std {self.std}) is one "
            "that the trained transformer computes at; change sft.density_mean or policy.trained"
        )

    def draw(
        self,
        keys: Sequence[Key],
        like: Latents,
        schedule: Float[Tensor, "points"],
        accepts: Callable[[float], bool] = lambda sigma: True,
    ) -> Draws:
        """One row per key.

        Args:
            like: latents of one shape with the noise.
            schedule: the family's noise levels, see `on_schedule`.
            accepts: which levels are allowed.
        """
        sigma = torch.stack([self.level(key, schedule, accepts) for key in keys])
        shares = [float(torch.rand((), generator=generator_of(*key, "caption"))) for key in keys]
        drops = torch.tensor([share < self.caption_dropout for share in shares], device=like.device)
        noise = keyed_noise(like.shape[1:], [(*key, "noise") for key in keys], like.device)
        return Draws(sigma, noise, drops)


def on_schedule(level: Tensor, schedule: Float[Tensor, "points"]) -> Tensor:
    """The noise level at a place of a schedule, 1 being its start and 0 its end; linear between its points.

    Evenly drawn places fall on the schedule as its own steps do, whatever its shift.
    """
    place = (1 - level) * (len(schedule) - 1)
    before = place.floor().clamp(0, len(schedule) - 2).long()
    return torch.lerp(schedule[before], schedule[before + 1], (place - before).to(schedule))


def noised(data: Latents, noise: Latents, sigma: Float[Tensor, "samples"]) -> Latents:
    """(1 - sigma) data + sigma noise, each sample at its own level."""
    level = sigma.to(data.device).view(-1, 1, 1, 1, 1)
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
