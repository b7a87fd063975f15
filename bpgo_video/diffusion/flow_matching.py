"""The flow-matching loss of rectified flow and the noise levels that it is taken at.

    x_sigma = (1 - sigma) data + sigma noise,   loss = |v(x_sigma, sigma) - (noise - data)|^2

The loss is the mean over latent dimensions (arXiv 2209.03003). Draws depend on their keys (seed, step, clip) and never
on the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpgo_video.randomness import generator_of
from bpgo_video.types import Conditioning, Latents, Velocity

Key = tuple[int | str, ...]
MAX_DRAWS = 1000
Density = Callable[[torch.Generator, float, float], Tensor]


def uniform(generator: torch.Generator, mean: float, std: float) -> Float[Tensor, ""]:
    """Uniform in [0, 1); ignores mean and std."""
    return torch.rand((), generator=generator)


def logit_normal(generator: torch.Generator, mean: float, std: float) -> Float[Tensor, ""]:
    """sigmoid(u), u ~ N(mean, std^2): most levels are in the middle (SD3, arXiv 2403.03206)."""
    return torch.sigmoid(mean + std * torch.randn((), generator=generator))


DENSITIES: dict[str, Density] = {"uniform": uniform, "logit_normal": logit_normal}


@dataclass(frozen=True)
class LevelDistribution:
    """The distribution of training noise levels: a key of DENSITIES with its mean and std."""

    density: str
    mean: float = 0.0
    std: float = 1.0

    def draw(
        self, key: Key, schedule: Float[Tensor, "points"], accepts: Callable[[float], bool] = lambda sigma: True
    ) -> Float[Tensor, ""]:
        """The first noise level drawn under this key that `accepts` takes.

        Args:
            schedule: the family's noise levels; see `on_schedule`.

        Raises:
            ValueError: none of the first 1000 draws is accepted.
        """
        generator = generator_of(*key, "level")
        for _ in range(MAX_DRAWS):
            sigma = on_schedule(DENSITIES[self.density](generator, self.mean, self.std), schedule)
            if accepts(float(sigma)):
                return sigma
        raise ValueError(
            f"none of {MAX_DRAWS} noise levels drawn from {self.density} (mean {self.mean}, std {self.std}) is one at "
            "which the trained transformer computes; change sft.density_mean or policy.trained, or loss.noise_levels"
        )


def on_schedule(level: Tensor, schedule: Float[Tensor, "points"]) -> Tensor:
    """The noise level at a position in a schedule, linear between its points; 1 is its start and 0 its end.

    Uniform positions are distributed like the schedule's own steps, whatever its shift.
    """
    position = (1 - level) * (len(schedule) - 1)
    before = position.floor().clamp(0, len(schedule) - 2).long()
    return torch.lerp(schedule[before], schedule[before + 1], (position - before).to(schedule))


def noised(data: Latents, noise: Latents, sigma: Float[Tensor, "samples"]) -> Latents:
    """(1 - sigma) data + sigma noise, with a noise level per sample."""
    level = sigma.to(data.device).view(-1, 1, 1, 1, 1)
    return (1 - level) * data + level * noise


def matching_error(velocity: Velocity, target: Velocity) -> Float[Tensor, "samples"]:
    """|velocity - target|^2 of each sample, the mean over latent dimensions."""
    return (velocity - target).square().flatten(1).mean(dim=1)


def without_captions(
    conditioning: Conditioning, negative: Conditioning, drops: Bool[Tensor, "samples"]
) -> dict[str, Tensor]:
    """The conditioning with the negative prompt in the rows of `drops`; tensors without a negative (images) stay."""
    return {
        name: torch.where(drops.view(-1, *[1] * (value.ndim - 1)), negative[name].to(value), value)
        if name in negative
        else value
        for name, value in conditioning.items()
    }
