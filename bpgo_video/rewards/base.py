"""What is a reward? A model that scores the frames of videos, or each video as a whole.

A user's own reward is any class with the members of `RewardModel`, named in a recipe as `my_pkg.rewards:MyReward`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.types import Videos

T = TypeVar("T")


@dataclass(frozen=True)
class Clips:
    """What a reward model is shown.

    Attributes:
        videos: RGB pixels in [0, 1].
        fps: frames a second, above 0.
        texts: the prompt of each video.
        images: the picture that each video was to continue (image-to-video), RGB in [0, 1]; None for prompts of texts.
    """

    videos: Videos
    fps: float
    texts: tuple[str, ...]
    images: Float[Tensor, "samples 3 height width"] | None = None
    _found: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.videos.shape[0]

    @property
    def times(self) -> Float[Tensor, "frames"]:
        """Seconds of each frame from the first."""
        return torch.arange(self.videos.shape[1], dtype=torch.float64) / self.fps

    def of(self, rows: Int[Tensor, "rows"]) -> Clips:
        """Some of the videos; what was found for all is not known of them."""
        images = None if self.images is None else self.images[rows]
        return Clips(self.videos[rows], self.fps, tuple(self.texts[row] for row in rows.tolist()), images)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, or what it gave for these clips before: rewards on one network share features by their key."""
        if key not in self._found:
            self._found[key] = compute()
        return self._found[key]


@dataclass(frozen=True)
class FrameScores:
    """What a reward model found.

    Attributes:
        values: a score per video and frame that was looked at, or a single column for the video as a whole.
        times: seconds of those frames from the first, increasing; None where the score is of the whole video.
    """

    values: Float[Tensor, "samples scored"]
    times: Float[Tensor, "scored"] | None = None


@dataclass(frozen=True)
class FrameSampling:
    """Which frames a model looks at: all of them, `count` spread evenly, or `fps` of every second.

    Raises:
        ValueError: both are given, or one that is not above 0.
    """

    count: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.fps is not None:
            raise ValueError(f"frames = {self.count} and frames_per_second = {self.fps}: give one of them")
        for name, value in (("frames", self.count), ("frames_per_second", self.fps)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value}: must be above 0; leave it out to look at every frame")

    def indices(self, total: int, fps: float) -> list[int]:
        """Of a video of `total` frames at `fps` a second, in order; an even spread of 2 or more has both ends."""
        if self.fps is not None:
            stride = max(1.0, fps / self.fps)
            return [round(i * stride) for i in range(int((total - 1) / stride) + 1)]
        if self.count is None or self.count >= total:
            return list(range(total))
        return [round(i * (total - 1) / max(1, self.count - 1)) for i in range(self.count)]

    def __str__(self) -> str:
        return f"{self.fps:g}fps" if self.fps is not None else str(self.count or "all")


@runtime_checkable
class RewardModel(Protocol):
    """Members that a reward model must have.

    Attributes:
        name, version: what was measured; the version is a hash that changes when the scores do.
        range: lowest and highest score.
        higher_is_better: a suite turns the sign of the others.
        differentiable: scores carry a gradient with respect to the pixels.
        kind: "real", "proxy" (stands in for a model that is not at hand) or "test" (knows the truth of a toy world).
        frames: which frames it looks at.
    """

    name: str
    version: str
    range: tuple[float, float]
    higher_is_better: bool
    differentiable: bool
    kind: str
    frames: FrameSampling

    def __call__(self, clips: Clips) -> FrameScores: ...


class RewardError(RuntimeError):
    """A reward model failed; the message names the model, the prompt and the sample."""


def at_least_two_frames(name: str, clips: Clips) -> None:
    """
    Raises:
        RewardError: a reward that compares frames is shown single pictures.
    """
    if clips.videos.shape[1] < 2:
        raise RewardError(f"reward {name!r} compares neighbouring frames; {clips.texts[0]!r} has a video of one frame")
