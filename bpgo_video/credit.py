"""Which part of a video earned its advantage? A video's advantage spread over its latent frames.

A reward that scores frames knows more than the mean that becomes the video's score. Segment credit keeps the video's
advantage as the mean over latent frames and moves it towards those in which the sample beats its group. It is beyond
the paper.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.advantages import group_relative


def segment_advantages(
    advantage: Float[Tensor, "prompts group"],
    frame_scores: Float[Tensor, "prompts group frames"],
    stride: int,
    gamma: float,
) -> Float[Tensor, "prompts group latent_frames"]:
    """A_{i,f} = A_i + gamma (z_{i,f} - mean_f z_i), so that mean_f A_{i,f} = A_i.

    z_{i,f} is the score of latent frame f, standardised over the group; see `latent_frame_scores`. A video whose latent
    frames all stand alike within their group has A_i everywhere.

    Args:
        frame_scores: of every pixel frame, higher is better.
        stride: pixel frames to a latent frame after the first; 4 for Wan's VAE.
        gamma: how much of a frame's own standing counts; at 0 every latent frame has A_i.

    Raises:
        ValueError: names a gamma below 0, or a number of frames that is not 1 more than a multiple of the stride.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma={gamma}: must be at least 0; below, frames would be blamed for what they did well")
    scores = latent_frame_scores(frame_scores, stride)
    z = torch.stack([group_relative(of_frame) for of_frame in scores.unbind(dim=2)], dim=2)
    return advantage[:, :, None] + gamma * (z - z.mean(dim=2, keepdim=True))


def latent_frame_scores(
    frame_scores: Float[Tensor, "prompts group frames"], stride: int
) -> Float[Tensor, "prompts group latent_frames"]:
    """Means over the pixel frames behind each latent frame of a causal VAE: 1, then `stride` each."""
    frames = frame_scores.shape[2]
    if stride < 1 or (frames - 1) % stride:
        raise ValueError(
            f"{frames} frame scores at a temporal stride of {stride}: a causal VAE has 1 + n * stride frames; score "
            "every frame of the video"
        )
    prompts, group, _ = frame_scores.shape
    rest = frame_scores[:, :, 1:].reshape(prompts, group, (frames - 1) // stride, stride)
    return torch.cat([frame_scores[:, :, :1], rest.mean(dim=3)], dim=2)
