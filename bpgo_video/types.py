"""Frozen dataclasses that the parts of a training step pass on, the names of their axes, and tables of methods.

prompts   prompts of one training step, the same list on every rank
group     samples of one prompt
samples   rows of one chunk: (prompt, sample) pairs in prompt-major order
steps     denoising transitions of a trajectory
points    noise levels of a trajectory, steps + 1
channels, latent_frames, latent_height, latent_width: a video in the policy's latent space
frames, height, width: a video in pixels, (samples, frames, 3, height, width) in [0, 1]
tokens, dim: text embeddings
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Conditioning = Mapping[str, Tensor]  # what the transformer is conditioned on; axis 0: prompt or sample
Latents = Float[Tensor, "samples channels latent_frames latent_height latent_width"]
Velocity = Latents  # d latents / d sigma = noise - data
Videos = Float[Tensor, "samples frames 3 height width"]
Row = TypeVar("Row")


class Table(dict[str, Row]):
    """Functions by name. A name `my_package.module:function` is the function that Python imports under it."""

    def __missing__(self, name: str) -> Any:
        """Import a function by its dotted name.

        Raises:
            KeyError: the name is neither a row nor of that form.
            ImportError, AttributeError: no such module or function.
        """
        if ":" not in name:
            raise KeyError(name)
        return resolve_name(name)


@dataclass(frozen=True)
class Audio:
    """The sound of videos.

    Attributes:
        waveform: between -1 and 1, unless a model exceeds them.
        sampling_rate: samples of each channel a second.
    """

    waveform: Float[Tensor, "samples audio_channels audio_samples"]
    sampling_rate: int

    def __getitem__(self, rows: Any) -> Audio:
        return replace(self, waveform=self.waveform[rows])


@dataclass(frozen=True)
class Guidance:
    """Conditioning of each sample for classifier-free guidance: `towards` its prompt, `away` from its negative prompt.

    Axis 0 of both is the sample. Entries that `away` lacks, such as an image, are taken from `towards`.
    """

    towards: Conditioning
    away: Conditioning

    def part(self, rows: slice) -> Guidance:
        """That of some of the samples, as views."""
        towards, away = ({name: value[rows] for name, value in half.items()} for half in (self.towards, self.away))
        return Guidance(towards, away)


@dataclass(frozen=True)
class PriorAnchor:
    """The reward that a typical, clear sample of each prompt should earn: R_prior of arXiv 2511.18919.

    Attributes:
        mean: the anchor, in the reward's units.
        std: standard deviation (ddof 1) of the samples that the mean averages, or of the means of groups that share a
            start; zeros for an anchor without samples.
        count: number of those samples or groups, so that std^2/count is the mean's sampling variance; or 0.
        scale: s_ref, the pooled within-group standard deviation of the reference; above 0.
        version: version of the reward that measured the anchor.
    """

    mean: Float[Tensor, "prompts"]
    std: Float[Tensor, "prompts"]
    count: Int[Tensor, "prompts"]
    scale: float
    version: str = ""

    @classmethod
    def of_samples(cls, rewards: Float[Tensor, "prompts reference"], version: str = "") -> PriorAnchor:
        """The anchor of two or more samples of the starting policy per prompt, in fp64.

        scale is s_ref = sqrt(mean_i s_i^2), s_i the standard deviation of prompt i's rewards (ddof 1).

        Raises:
            ValueError: s_ref is 0, since all samples of every prompt earn the same reward.
        """
        rewards = rewards.double()
        scale = float(rewards.var(dim=1).mean().sqrt())
        if not scale > 0:
            raise ValueError(f"s_ref is {scale}: every prompt's {rewards.shape[1]} samples earn the same")
        count = torch.full(rewards.shape[:1], rewards.shape[1])
        return cls(rewards.mean(dim=1), rewards.std(dim=1), count, scale, version)

    @classmethod
    def without_samples(cls, mean: Float[Tensor, "prompts"], scale: float, version: str = "") -> PriorAnchor:
        """An anchor that was not measured: a constant, or a running average."""
        return cls(mean, torch.zeros_like(mean), torch.zeros(len(mean), dtype=torch.int64), scale, version)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one step.

    Attributes:
        ids: unique 64-bit integers.
        negative: conditioning of the distinct negative prompts; axis 0 is the negative prompt.
        negative_rows: row of each prompt's negative prompt in `negative`; None if all have the first.
        priors: anchors by the reward's name.
        images: first frames for image-to-video, RGB in [0, 1] at the video's size; None if the prompts have no images.
        videos: files of the prompts' videos, which `conditioned` keeps for a policy that follows them; None without.
        again: the prompts whose videos are scored again, by rewards with several scorings; None for all.
        tags: of each prompt, such as its kind; empty if none is known.
    """

    ids: Int[Tensor, "prompts"]
    texts: tuple[str, ...]
    conditioning: Conditioning
    negative: Conditioning = field(default_factory=dict)
    negative_rows: Int[Tensor, "prompts"] | None = None
    priors: Mapping[str, PriorAnchor] = field(default_factory=dict)
    images: Float[Tensor, "prompts 3 height width"] | None = None
    videos: tuple[bytes, ...] | None = None
    again: Bool[Tensor, "prompts"] | None = None
    tags: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Trajectory:
    """Denoising trajectories of a chunk of samples, as replay needs them.

    Attributes:
        prompt_rows: row of each sample's prompt in the step's PromptBatch.
        sample_index: position of each sample within its group.
        trained_steps: indices of the stochastic steps, in order.
        latents: from noise to data, in the sampler's dtype.
        log_probs: log-probability of each transition, mean over latent dimensions, fp32; nan if deterministic.
        means: means of the trained steps' transitions; None if the objective does not compare them.
        frame_log_probs: log_probs per latent frame; None if credit is not assigned per frame.
    """

    prompt_rows: Int[Tensor, "samples"]
    sample_index: Int[Tensor, "samples"]
    trained_steps: tuple[int, ...]
    latents: Float[Tensor, "samples points channels latent_frames latent_height latent_width"]
    log_probs: Float[Tensor, "samples steps"]
    means: Float[Tensor, "samples trained channels latent_frames latent_height latent_width"] | None = None
    frame_log_probs: Float[Tensor, "samples steps latent_frames"] | None = None

    def __len__(self) -> int:
        return self.latents.shape[0]

    def part(self, rows: slice) -> Trajectory:
        """Some of the samples, as views."""
        sliced: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **sliced)

    def to(self, device: torch.device) -> Trajectory:
        """The trajectory with latents, log-probs and means on a device; indices are not moved."""
        optional = {"means": self.means, "frame_log_probs": self.frame_log_probs}
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in optional.items() if tensor is not None}
        return replace(self, latents=self.latents.to(device), log_probs=self.log_probs.to(device), **moved)


@dataclass(frozen=True)
class RolloutChunk:
    """A few micro-batches of a rollout, and the videos of their samples that this rank decodes.

    The ranks of a sequence group share the videos of their samples. Videos are dropped after scoring. Trees have more
    samples than a chunk has videos: the first chunk has all of their trajectories, and the next ones have none.

    Attributes:
        prompt_rows, sample_index: prompt and sample of each video, as in Trajectory.
        audio: the videos' sound; None for a policy that makes none.
    """

    trajectories: tuple[Trajectory, ...]
    videos: Videos
    prompt_rows: Int[Tensor, "samples"]
    sample_index: Int[Tensor, "samples"]
    audio: Audio | None = None

    def sound(self, row: int) -> Audio | None:
        """Of one of the videos."""
        return None if self.audio is None else self.audio[row : row + 1]


@dataclass(frozen=True)
class Rewards:
    """Scores of one step's samples, gathered: the same on every rank. Higher is always better.

    Attributes:
        by_name: each reward's score per video: the mean of its scorings.
        total: weighted sum of the scores, for logs; advantages are estimated per reward.
        per_frame: each model's score per sampled frame, of the first scoring.
        frame_times: time of each sampled frame in seconds; None for a model that scores videos as a whole.
        scorings: each scoring of the rewards that have several; nan from the second on for prompts scored once.
        stds: standard deviation of the error of each score in by_name, of the rewards that state it.
    """

    by_name: Mapping[str, Float[Tensor, "prompts group"]]
    total: Float[Tensor, "prompts group"]
    per_frame: Mapping[str, Float[Tensor, "prompts group scored"]]
    frame_times: Mapping[str, Float[Tensor, "scored"] | None]
    scorings: Mapping[str, Float[Tensor, "prompts group scorings"]] = field(default_factory=dict)
    stds: Mapping[str, Float[Tensor, "prompts group"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """A scalar to differentiate, with detached metrics that explain it."""

    value: Float[Tensor, ""]
    metrics: Mapping[str, torch.Tensor]
