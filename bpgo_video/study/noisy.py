"""A reward with errors of known size, for studies on the embedded world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bpgo_video.config.learner import RewardConfig
from bpgo_video.randomness import generator_of
from bpgo_video.rewards.base import Clips, Device, FrameScores, RewardModel
from bpgo_video.rewards.networks import Backbones
from bpgo_video.rewards.reward import build_models
from bpgo_video.tiny.world import Caption


class NoisyReward(RewardModel):
    """Another reward plus errors.

    An error is a function of the video and the seed: the same on whichever rank, and in whichever call. Another seed
    is an independent scoring.

    Args:
        model, options: the other reward, as in a recipe.
        clear, ambiguous: standard deviation of the error of a video's mean score, for captions that state every
            attribute and for others.
        shared: share of the error's variance that all frames of a video have in common, in [0, 1].
    """

    name, kind = "noisy", "test"
    range = (float("-inf"), float("inf"))

    def __init__(
        self, model: str, clear: float, ambiguous: float, shared: float = 0.5, seed: int = 0,
        options: Mapping[str, Any] | None = None, device: Device = "cpu", backbones: Backbones | None = None,
    ):  # fmt: skip
        if not 0 <= shared <= 1 or min(clear, ambiguous) < 0:
            raise ValueError(f"clear={clear}, ambiguous={ambiguous}, shared={shared}: deviations from 0, share 0 to 1")
        own = RewardConfig(model, options=dict(options or {}))
        (self.inner,) = build_models("noisy", own, torch.device(device), backbones)
        self.deviations, self.shared, self.seed = (ambiguous, clear), shared, seed
        self.higher_is_better, self.frames = self.inner.higher_is_better, self.inner.frames
        self.version = f"{self.inner.version}-{clear:g}-{ambiguous:g}-{shared:g}-{seed}"

    def __call__(self, clips: Clips) -> FrameScores:
        scores = self.inner(clips)
        count = scores.values.shape[1]
        parts = torch.tensor([self.shared, (1 - self.shared) * count]).sqrt()  # of frames: count times the variance
        errors = torch.empty_like(scores.values, device="cpu")
        for row, text in enumerate(clips.texts):
            pixels = int(clips.videos[row].double().sum() * 1e6)
            draws = torch.randn(1 + count, generator=generator_of(self.seed, "noisy reward", pixels))
            deviation = self.deviations[Caption.parse(text).is_clear]
            errors[row] = deviation * (parts[0] * draws[0] + parts[1] * draws[1:])
        return replace(scores, values=scores.values + errors.to(scores.values.device))
