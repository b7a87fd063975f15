"""The surrogate world: Gaussian policies that share parameters, with true rewards whose expectations are known.

A policy answers prompt i with samples x = mu_i + sigma eps, mu_i = features_i @ theta, so that an update for one prompt
moves the answers to all others. The true reward is quadratic around the prompt's target t_i,

    r_i(x) = c_i/2 (|t_i|^2 + D sigma^2 - |x - t_i|^2),      E r_i = c_i/2 (|t_i|^2 - |mu_i - t_i|^2),

0 on average at the start, theta = 0, and c_i makes its deviation within a group 1 there: all noise is in that unit.
Everything is in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.randomness import generator_of
from bpgo_video.study.preregistration import WorldSizes

Samples = Float[Tensor, "prompts group latents"]
Rows = Int[Tensor, "prompts"]
PerPrompt = Float[Tensor, "all_prompts"]
Parameters = Float[Tensor, "features latents"]


@dataclass(frozen=True)
class World:
    """Prompts and their targets.

    Attributes:
        features: of each prompt, of length 1; the first one is shared by all prompts.
        targets: t_i = features_i @ theta*, reachable for all prompts at once.
        sigma: of the policy.
    """

    features: Float[Tensor, "all_prompts features"]
    targets: Float[Tensor, "all_prompts latents"]
    sigma: float

    @property
    def scale(self) -> PerPrompt:
        """c_i = 1/sqrt(sigma^2 |t_i|^2 + sigma^4 D/2), the inverse deviation of |x - t_i|^2/2 at the start."""
        latents = self.targets.shape[1]
        return (self.sigma**2 * self.targets.square().sum(dim=1) + self.sigma**4 * latents / 2).rsqrt()

    @property
    def highest(self) -> PerPrompt:
        """The highest expected reward, at mu_i = t_i."""
        return self.scale / 2 * self.targets.square().sum(dim=1)

    def start(self) -> Parameters:
        return self.features.new_zeros(self.features.shape[1], self.targets.shape[1])

    def samples(self, theta: Parameters, rows: Rows, noise: Samples) -> Samples:
        """x = mu_i + sigma noise."""
        return (self.features[rows] @ theta)[:, None] + self.sigma * noise

    def reward(self, rows: Rows, samples: Samples) -> Float[Tensor, "prompts group"]:
        """The true reward of each sample."""
        return quadratic(samples, self.targets[rows], self.scale[rows], self.sigma)

    def expected_reward(self, theta: Parameters) -> PerPrompt:
        """The true reward of the policy on each prompt, without sampling error."""
        distance = (self.features @ theta - self.targets).square().sum(dim=1)
        return self.highest - self.scale / 2 * distance

    def surrogate_gradient(self, rows: Rows, noise: Samples, advantage: Float[Tensor, "prompts group"]) -> Parameters:
        """Gradient in theta of -mean_ij ratio_ij A_ij at ratio 1, which is that of the clipped surrogate.

        The score of x is d log p/d mu = noise/sigma, and d mu_i/d theta = features_i.
        """
        scores = (advantage[..., None] * noise).sum(dim=1) / self.sigma
        return -(self.features[rows].T @ scores) / advantage.numel()


def quadratic(
    samples: Samples, targets: Float[Tensor, "prompts latents"], scale: Float[Tensor, "prompts"], sigma: float
) -> Float[Tensor, "prompts group"]:
    """c/2 (|t|^2 + D sigma^2 - |x - t|^2)."""
    distance = (samples - targets[:, None]).square().sum(dim=2)
    highest = targets.square().sum(dim=1) + targets.shape[1] * sigma**2
    return scale[:, None] / 2 * (highest[:, None] - distance)


def make_world(sizes: WorldSizes, prompts: int, seed: int) -> World:
    """The world of a seed: features with a shared and a random half, and a random theta*."""
    generator = generator_of("study", seed, "world")
    own = normal((prompts, sizes.features - 1), generator)
    features = torch.cat([torch.ones(prompts, 1, dtype=torch.float64), own / own.norm(dim=1, keepdim=True)], dim=1)
    features = features / 2**0.5
    best = normal((sizes.features, sizes.latents), generator) / sizes.latents**0.5
    return World(features, features @ best, sizes.sigma)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
