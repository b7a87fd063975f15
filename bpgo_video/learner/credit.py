"""Which part of a video earned its advantage? What each latent frame adds to the video's advantage.

A reward that scores frames knows more than the mean that becomes the video's score. Segment credit keeps the video's
advantage as the mean over latent frames and moves it towards those in which the sample beats its group. It is beyond
the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.advantages import group_relative


@dataclass(frozen=True)
class FrameLayout:
    """How a causal VAE lays a video's frames onto latent frames: the first by itself, then `stride` to each.

    Attributes:
        given: latent frames at the start that an image fixes: nothing was sampled there, and nothing is credited.

    Raises:
        ValueError: num_frames is not 1 more than a multiple of the stride.
    """

    num_frames: int
    fps: float
    stride: int
    given: int = 0

    def __post_init__(self) -> None:
        if self.stride < 1 or (self.num_frames - 1) % self.stride:
            raise ValueError(
                f"{self.num_frames} frames at a temporal stride of {self.stride}: a causal VAE has 1 + n * stride"
            )

    def weights(self, times: Float[Tensor, "scored"]) -> Float[Tensor, "scored latent_frames"]:
        """How much the score at each time counts in each sampled latent frame, columns adding up to 1.

        Scores are interpolated linearly to all frames, held before the first and behind the last, and averaged over the
        frames of each latent frame.
        """
        known = times.double().cpu()
        at_frames = torch.ones(1, self.num_frames, dtype=torch.float64)
        if len(known) > 1:
            frames = torch.arange(self.num_frames, dtype=torch.float64) / self.fps
            right = torch.searchsorted(known, frames).clamp(1, len(known) - 1)
            share = ((frames - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
            basis = torch.eye(len(known), dtype=torch.float64)
            at_frames = (1 - share) * basis[:, right - 1] + share * basis[:, right]
        rest = at_frames[:, 1:].unflatten(1, (-1, self.stride)).mean(dim=2) if self.num_frames > 1 else at_frames[:, 1:]
        return torch.cat([at_frames[:, :1], rest], dim=1)[:, self.given :]


def frame_credit(
    frame_scores: Float[Tensor, "prompts group scored"], times: Float[Tensor, "scored"], layout: FrameLayout
) -> Float[Tensor, "prompts group latent_frames"]:
    """z_{i,f} - mean_f z_i, z_{i,f} the score of latent frame f standardised over the group."""
    scores = frame_scores.double() @ layout.weights(times).to(frame_scores.device)
    z = torch.stack([group_relative(of_frame) for of_frame in scores.unbind(dim=2)], dim=2)
    return z - z.mean(dim=2, keepdim=True)


def segment_credit(
    per_frame: Mapping[str, Float[Tensor, "prompts group _"]],
    times: Mapping[str, Float[Tensor, "_"] | None],
    weights: Mapping[str, float],
    layout: FrameLayout,
    gamma: float,
) -> Float[Tensor, "prompts group latent_frames"]:
    """sum_r weight_r gamma (z_{r,i,f} - mean_f z_{r,i}): added to A_i = sum_r weight_r A_{r,i}, whose mean it keeps.

    Rewards that score videos as a whole say nothing of their frames and add nothing.

    Args:
        gamma: how much of a frame's own standing counts, at least 0.

    Raises:
        ValueError: no reward of weight above 0 scores frames.
    """
    found = [
        weights[name] * frame_credit(per_frame[name], of_reward, layout)
        for name, of_reward in times.items()
        if of_reward is not None and weights[name] > 0
    ]
    if not found:
        raise ValueError(
            f"credit.kind is 'segment', but {sorted(times)} score videos as a whole; set it to 'video', or train on a "
            "reward that scores frames"
        )
    return (gamma * torch.stack(found).sum(dim=0)).float()
