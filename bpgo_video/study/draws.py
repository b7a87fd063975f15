"""The random numbers of a run, a function of its seed alone: every arm meets the same prompts, samples and noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.randomness import generator_of
from bpgo_video.study.judges import ScoringDraws
from bpgo_video.study.preregistration import WorldSizes
from bpgo_video.study.world import normal

Scorings = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Draws:
    """Drawn for all steps at once, when they are first needed.

    Attributes:
        prompts: of the world.
    """

    sizes: WorldSizes
    prompts: int
    seed: int

    @property
    def _videos(self) -> tuple[int, int, int]:
        return self.sizes.steps, self.sizes.prompts_per_step, self.sizes.group_size

    @cached_property
    def order(self) -> Int[Tensor, "steps prompts"]:
        """The prompts of each step: all of them in a random order, then again in another one."""
        generator = generator_of("study", self.seed, "order")
        visits = self.sizes.steps * self.sizes.prompts_per_step
        rounds = [torch.randperm(self.prompts, generator=generator) for _ in range(-(-visits // self.prompts))]
        return torch.cat(rounds)[:visits].view(self.sizes.steps, self.sizes.prompts_per_step)

    @cached_property
    def noise(self) -> Float[Tensor, "steps prompts group latents"]:
        """Of the policy's samples."""
        return normal((*self._videos, self.sizes.latents), generator_of("study", self.seed, "samples"))

    @cached_property
    def uniform(self) -> Float[Tensor, "steps prompts"]:
        """Random reliabilities."""
        return torch.rand(*self._videos[:2], generator=generator_of("study", self.seed, "rho"), dtype=torch.float64)

    def scoring(self, step: int, judge: int, scoring: int) -> ScoringDraws:
        """Of one judge's `scoring`-th scoring of a step's videos."""
        key = (judge, scoring)
        if key not in self._scorings:
            self._scorings[key] = self._drawn(judge, scoring)
        shared, own, side, uniform = (drawn[step] for drawn in self._scorings[key])
        return ScoringDraws(self._quality[step], shared, own, side, uniform)

    def reference(self, judge: int) -> tuple[Int[Tensor, "prompts"], Tensor, ScoringDraws]:
        """All prompts, noise of samples of the starting policy, and a scoring of them."""
        generator = generator_of("study", self.seed, "reference", judge)
        videos = (self.prompts, self.sizes.reference_samples)
        noise = normal((*videos, self.sizes.latents), generator)
        quality = normal((*videos, self.sizes.frames), generator)
        return torch.arange(self.prompts), noise, ScoringDraws(quality, *self._scoring(videos, generator))

    @cached_property
    def _scorings(self) -> dict[tuple[int, int], Scorings]:
        return {}

    @cached_property
    def _quality(self) -> Float[Tensor, "steps prompts group frames"]:
        return normal((*self._videos, self.sizes.frames), generator_of("study", self.seed, "quality"))

    def _drawn(self, judge: int, scoring: int) -> Scorings:
        return self._scoring(self._videos, generator_of("study", self.seed, "judge noise", judge, scoring))

    def _scoring(self, videos: tuple[int, ...], generator: torch.Generator) -> Scorings:
        frames = (*videos, self.sizes.frames)
        shared, own = normal(videos, generator), normal(frames, generator)
        side = 2.0 * torch.randint(2, videos, generator=generator).double() - 1
        return shared, own, side, torch.rand(frames, generator=generator, dtype=torch.float64)
