"""The contract of reward models: their input, their output and their members.

A user's own reward is any class with the members of `RewardModel`, named in a recipe as `my_pkg.rewards:MyReward`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.types import Audio, Videos

T = TypeVar("T")
Device = torch.device | str
Scores = Float[Tensor, "samples scored"]


@dataclass(frozen=True)
class Clips:
    """The videos that a reward model scores.

    Attributes:
        videos: RGB pixels in [0, 1].
        fps: frames per second, above 0.
        texts: the prompt of each video.
        images: the image that each video continues (image-to-video), RGB in [0, 1]; None for text prompts.
        audio: the videos' sound; None for silent videos.
        groups: the same number for all samples of a prompt, for models that compare them; None for the others.
    """

    videos: Videos
    fps: float
    texts: tuple[str, ...]
    images: Float[Tensor, "samples 3 height width"] | None = None
    audio: Audio | None = None
    groups: Int[Tensor, "samples"] | None = None
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.videos.shape[0]

    @property
    def times(self) -> Float[Tensor, "frames"]:
        """Seconds from the first frame to each frame."""
        return torch.arange(self.videos.shape[1], dtype=torch.float64) / self.fps

    def select(self, rows: Int[Tensor, "rows"] | slice) -> Clips:
        """The videos of these rows, with an empty cache."""
        texts = self.texts[rows] if isinstance(rows, slice) else tuple(self.texts[row] for row in rows.tolist())
        images = None if self.images is None else self.images[rows]
        audio = None if self.audio is None else self.audio[rows]
        groups = None if self.groups is None else self.groups[rows]
        return Clips(self.videos[rows], self.fps, texts, images, audio, groups)

    def stills(self) -> Clips:
        """The conditioning images as videos of one frame."""
        assert self.images is not None
        return Clips(self.images[:, None], self.fps, self.texts)

    def cached(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, cached under `key`: rewards that share a network share its features."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


@dataclass(frozen=True)
class FrameScores:
    """The scores that a reward model returns.

    Attributes:
        values: one score per video and scored frame, or one column with the score of the whole video.
        times: seconds of the scored frames from the first frame, increasing; None for scores of whole videos.
        std: standard deviation of each score's error, as the model itself estimates it; None if it does not.
    """

    values: Scores
    times: Float[Tensor, "scored"] | None = None
    std: Scores | None = None


@dataclass(frozen=True)
class FrameSampling:
    """The frames that a model scores: all of them, `count` evenly spread ones, or `fps` per second.

    Raises:
        ValueError: both are given, or one is not above 0.
    """

    count: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.fps is not None:
            raise ValueError(f"frames = {self.count} and frames_per_second = {self.fps}: give one of them")
        for name, value in (("frames", self.count), ("frames_per_second", self.fps)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value}: must be above 0; leave it out to score every frame")

    def indices(self, total: int, fps: float) -> list[int]:
        """Sampled frames of a video of `total` frames, in order; 2 or more evenly spread ones include both ends."""
        if self.fps is not None:
            stride = max(1.0, fps / self.fps)
            return [round(i * stride) for i in range(int((total - 1) / stride) + 1)]
        if self.count is None or self.count >= total:
            return list(range(total))
        return evenly_spread(self.count, total)

    def of(self, clips: Clips) -> list[int]:
        return self.indices(clips.videos.shape[1], clips.fps)

    def __str__(self) -> str:
        return f"{self.fps:g}fps" if self.fps is not None else str(self.count or "all")


def evenly_spread(count: int, total: int) -> list[int]:
    """`count` of `total` frames, both ends included; a video of fewer frames repeats some."""
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


@runtime_checkable
class RewardModel(Protocol):
    """Members of a reward model. Subclasses of this class inherit the defaults. See also `listens`, `groupwise`.

    Attributes:
        name, version: identify the score; the version must change whenever scores do.
        range: lowest and highest score.
        higher_is_better: a suite negates the scores of models where this is False.
        differentiable: scores have a gradient with respect to the pixels.
        kind: "real", "proxy" (replaces an unavailable model) or "test" (knows the ground truth of a toy world).
        frames: the frames that it scores.
    """

    name: str
    version: str
    range: tuple[float, float] = (0.0, 1.0)
    higher_is_better: bool = True
    differentiable: bool = False
    kind: str = "real"
    frames: FrameSampling = FrameSampling()

    def __call__(self, clips: Clips) -> FrameScores: ...


def listens(model: object) -> bool:
    """Whether a reward model, or its class, reads `Clips.audio`: it then states `listens = True`."""
    return getattr(model, "listens", False) is True


def groupwise(model: object) -> bool:
    """Whether a reward model, or its class, compares the samples of a prompt: it then states `groupwise = True`.

    Its clips are whole groups, in the order of samples, with `Clips.groups`; their videos are on the CPU.
    """
    return getattr(model, "groupwise", False) is True


class FrameReward(RewardModel):
    """A reward with a score for each sampled frame, or, if it compares frames, for the last of them."""

    def score(self, clips: Clips, indices: list[int]) -> Scores:
        raise NotImplementedError(f"{type(self).__name__} has no score()")

    def __call__(self, clips: Clips) -> FrameScores:
        indices = self.frames.of(clips)
        scores = self.score(clips, indices)
        return FrameScores(scores, clips.times[indices[-scores.shape[1] :]])


class RewardError(RuntimeError):
    """A reward model failed; the message names the model, the prompt and the sample."""
