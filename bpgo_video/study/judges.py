"""Judges of the surrogate world: how the score of a video departs from its true reward.

A judge's score is a function of the sample, which may be wrong, plus noise that a second scoring draws anew. Its frame
scores have that score as their mean but for the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpgo_video.randomness import generator_of
from bpgo_video.study.preregistration import Regime, WorldSizes
from bpgo_video.study.world import PerPrompt, Rows, Samples, World, normal, quadratic

LEVEL = 5.0  # of all scores: rewards are above 0, as those of video models are
SECOND_TILT = 0.2  # of every judge but the first: the deviation of its score by a direction of its own
Mask = Bool[Tensor, "all_prompts"]
Direction = Float[Tensor, "latents"]
FrameScores = Float[Tensor, "prompts group frames"]


class ScoringDraws(NamedTuple):
    """Random numbers of one scoring of a step's videos.

    Attributes:
        quality: standard normal, of true differences between frames; equal in all scorings.
        shared: standard normal, of the noise that a video's frames share.
        own: standard normal, of the noise of single frames.
        side: -1 or 1, the interpretation.
        uniform: in [0, 1), of outliers.
    """

    quality: FrameScores
    shared: Float[Tensor, "prompts group"]
    own: FrameScores
    side: Float[Tensor, "prompts group"]
    uniform: FrameScores


@dataclass(frozen=True)
class Judge:
    """One judge of a world's prompts.

    Attributes:
        ambiguous: prompts that it judges badly.
        bias: offset of each prompt.
        wrong_targets: what it rewards on ambiguous prompts if it misleads.
        axes: of the two interpretations of each prompt: scores differ by twice their product with x - t.
        tilt: direction that it likes, with the deviation that it gives to the scores.
    """

    world: World
    regime: Regime
    frame_std: float
    ambiguous: Mask
    bias: PerPrompt
    wrong_targets: Float[Tensor, "all_prompts latents"]
    axes: Float[Tensor, "all_prompts latents"]
    tilt: Direction

    def of_prompts(self, pair: tuple[float, float], rows: Rows) -> Float[Tensor, "prompts"]:
        """The value of clear or of ambiguous prompts."""
        return self.bias.new_tensor(pair)[self.ambiguous[rows].long()]

    def opinion(self, rows: Rows, samples: Samples) -> Float[Tensor, "prompts group"]:
        """The score without noise."""
        world, ambiguous = self.world, self.ambiguous[rows][:, None]
        score = world.reward(rows, samples)
        if self.regime.misleading is not None:
            wrong = quadratic(samples, self.wrong_targets[rows], world.scale[rows], world.sigma)
            score = torch.where(ambiguous, wrong + self.regime.misleading, score)
        score = score + samples @ self.tilt
        if self.regime.saturation is not None:
            cap = self.regime.saturation * world.highest[rows][:, None]
            score = torch.where(score > 0, cap * (1 - torch.exp(-score.clamp(min=0) / cap)), score)
        return LEVEL + self.bias[rows][:, None] + score

    def frames(self, rows: Rows, samples: Samples, draws: ScoringDraws) -> FrameScores:
        """One scoring of each video's frames."""
        regime, count = self.regime, draws.own.shape[2]
        noise = self.of_prompts(regime.noise, rows)[:, None]
        video = self.opinion(rows, samples) + noise * regime.shared**0.5 * draws.shared
        if regime.interpretation:
            away = ((samples - self.world.targets[rows][:, None]) * self.axes[rows][:, None]).sum(dim=2)
            video = video + self.ambiguous[rows][:, None] * draws.side * away
        frames = noise[..., None] * ((1 - regime.shared) * count) ** 0.5 * draws.own
        frames = frames + self.frame_std * (draws.quality - draws.quality.mean(dim=2, keepdim=True))
        if any(regime.outliers):
            half = self.of_prompts(regime.outliers, rows)[:, None, None] / 2
            frames = frames + regime.outlier * ((draws.uniform < half).double() - (draws.uniform >= 1 - half).double())
        return video[..., None] + frames


def make_judge(world: World, regime: Regime, sizes: WorldSizes, seed: int, index: int) -> Judge:
    """Judge number `index` of a seed; other judges err on other prompts and in other directions."""
    generator = generator_of("study", seed, "judge", index)
    prompts, latents = world.targets.shape
    ambiguous = torch.zeros(prompts, dtype=torch.bool)
    ambiguous[torch.randperm(prompts, generator=generator)[: prompts // 2]] = True
    wrong = normal((world.features.shape[1], latents), generator) / latents**0.5
    axes, tilt = normal((prompts, latents), generator), normal((latents,), generator)
    axes, tilt = axes / axes.norm(dim=1, keepdim=True), tilt / tilt.norm()
    along = (axes * world.targets).sum(dim=1)
    deviation = (along.square() + world.sigma**2).sqrt()  # RMS of the product of x - t and the axis, at the start
    strength = (regime.hack**2 + (SECOND_TILT**2 if index else 0)) ** 0.5
    return Judge(
        world,
        regime,
        sizes.frame_std,
        ambiguous,
        regime.bias * normal((prompts,), generator),
        world.features @ wrong,
        regime.interpretation * axes / deviation[:, None],
        strength * tilt / world.sigma,
    )
