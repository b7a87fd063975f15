"""What flows between the parts: frozen dataclasses, and the one legend of their axes.

prompts   prompts of one training step, the same list on every rank
group     samples of one prompt
samples   rows of one chunk: (prompt, sample) pairs in prompt-major order
steps     denoising transitions of a trajectory
points    noise levels that it visits: one more than steps
channels, latent_frames, latent_height, latent_width: a video in the policy's latent space
frames, height, width: a video in pixels, (samples, frames, 3, height, width) in [0, 1]
tokens, dim: text embeddings
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Conditioning = Mapping[str, Tensor]  # what the policy's transformer is conditioned on; axis 0 is the prompt or sample
Latents = Float[Tensor, "samples channels latent_frames latent_height latent_width"]
Velocity = Latents  # d latents / d sigma = noise - data
Videos = Float[Tensor, "samples frames 3 height width"]


@dataclass(frozen=True)
class Guidance:
    """What each sample is drawn towards, its prompt, and by classifier-free guidance away from, its negative prompt.

    Axis 0 of both is the sample. What `away` lacks is the sample's own: an image is kept, whatever the text.
    """

    towards: Conditioning
    away: Conditioning


@dataclass(frozen=True)
class PriorAnchor:
    """The reward a typical, clear sample of each prompt should earn: R_prior of arXiv 2511.18919.

    Attributes:
        mean: the anchor, in the reward's own units.
        std: spread of the reference samples per prompt (ddof 1), or zeros where no samples stand behind it.
        count: number of reference samples per prompt; 0 where none stand behind it.
        scale: s_ref, the pooled within-group standard deviation of the reference; above 0.
        version: the reward version that the anchor was measured with.
    """

    mean: Float[Tensor, "prompts"]
    std: Float[Tensor, "prompts"]
    count: Int[Tensor, "prompts"]
    scale: float
    version: str = ""

    @classmethod
    def of_samples(cls, rewards: Float[Tensor, "prompts reference"], version: str = "") -> PriorAnchor:
        """Measured on samples of the starting policy, two or more of each prompt, in fp64.

        scale is s_ref = sqrt(mean_i s_i^2), s_i the standard deviation of prompt i's rewards (ddof 1).

        Raises:
            ValueError: all samples of every prompt earn the same, so that no deviation could be told from noise.
        """
        rewards = rewards.double()
        scale = float(rewards.var(dim=1).mean().sqrt())
        if not scale > 0:
            raise ValueError(f"s_ref is {scale}: every prompt's {rewards.shape[1]} samples earn the same")
        count = torch.full(rewards.shape[:1], rewards.shape[1])
        return cls(rewards.mean(dim=1), rewards.std(dim=1), count, scale, version)

    @classmethod
    def without_samples(cls, mean: Float[Tensor, "prompts"], scale: float, version: str = "") -> PriorAnchor:
        """An anchor that no samples stand behind: a constant, or an average over the run."""
        return cls(mean, torch.zeros_like(mean), torch.zeros(len(mean), dtype=torch.int64), scale, version)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one step.

    Attributes:
        ids: unique 64-bit integers.
        negative: conditioning of the negative prompts, each once; axis 0 is the distinct negative prompt.
        negative_rows: which of them each prompt has; None where all have the first.
        priors: a reward's name -> its anchor.
        images: what image-to-video starts from, RGB in [0, 1] at the video's size, where the prompts have images.
        twice: whose videos are scored by the second models, too, where there are any; None for all.
    """

    ids: Int[Tensor, "prompts"]
    texts: tuple[str, ...]
    conditioning: Conditioning
    negative: Conditioning = field(default_factory=dict)
    negative_rows: Int[Tensor, "prompts"] | None = None
    priors: Mapping[str, PriorAnchor] = field(default_factory=dict)
    images: Float[Tensor, "prompts 3 height width"] | None = None
    twice: Bool[Tensor, "prompts"] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Trajectory:
    """What replay needs of a chunk of samples.

    Attributes:
        prompt_rows: row of each sample's prompt in the step's PromptBatch.
        sample_index: position of each sample within its group.
        trained_steps: indices of the stochastic steps, in order.
        latents: the path from noise to data, stored in the sampler's declared dtype.
        log_probs: of each transition, mean over latent dimensions, fp32; nan where the transition was deterministic.
        means: of the trained steps' transitions, where the objective compares them.
        frame_log_probs: as log_probs, of each latent frame, where frames are credited by themselves.
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

    def to(self, device: torch.device) -> Trajectory:
        """The same with its latents, log-probs and means there; indices stay where they are."""
        optional = {"means": self.means, "frame_log_probs": self.frame_log_probs}
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in optional.items() if tensor is not None}
        return replace(self, latents=self.latents.to(device), log_probs=self.log_probs.to(device), **moved)


@dataclass(frozen=True)
class RolloutChunk:
    """A few micro-batches of a rollout and, of their samples, the videos that this rank decodes.

    A rank that is alone in its sequence group decodes all; the ranks of one share them. Videos are dropped once scored.

    Attributes:
        prompt_rows, sample_index: whose these videos are, as in Trajectory.
    """

    trajectories: tuple[Trajectory, ...]
    videos: Videos
    prompt_rows: Int[Tensor, "samples"]
    sample_index: Int[Tensor, "samples"]


@dataclass(frozen=True)
class Rewards:
    """Scores of one step's samples, gathered: the same on every rank.

    Attributes:
        by_name: each reward model's score per video, oriented so that higher is better.
        total: their weighted sum, for logs; advantages are estimated per reward.
        per_frame: each model's score per sampled frame, oriented alike.
        frame_times: seconds of those frames; None where a model scores videos as a whole.
        second: the videos' scores by the second models, oriented alike, nan where a prompt was scored once; empty where
            none are used.
    """

    by_name: Mapping[str, Float[Tensor, "prompts group"]]
    total: Float[Tensor, "prompts group"]
    per_frame: Mapping[str, Float[Tensor, "prompts group scored"]]
    frame_times: Mapping[str, Float[Tensor, "scored"] | None]
    second: Mapping[str, Float[Tensor, "prompts group"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """A scalar to differentiate and the detached numbers that explain it."""

    value: Float[Tensor, ""]
    metrics: Mapping[str, torch.Tensor]
