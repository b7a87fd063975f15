"""How far decoding in tiles moves rewards, measured on a few videos of a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.rollouts.conditioning import rows_of
from bpgo_video.training.session import Session
from bpgo_video.types import PromptBatch, RolloutChunk, Trajectory

VIDEOS = 2  # of a rank


@contextmanager
def whole_videos(vae: Any) -> Iterator[None]:
    """A VAE that decodes in tiles does not inside the block."""
    vae.disable_tiling()
    try:
        yield
    finally:
        vae.enable_tiling()


@torch.no_grad()
def tile_differences(
    session: Session, prompts: PromptBatch, trajectory: Trajectory
) -> dict[str, Float[Tensor, "samples"]]:
    """Scores with tiles minus scores without, by reward, of the first videos of a micro-batch of this rank.

    Rewards that compare the samples of a prompt are left out.

    Raises:
        torch.OutOfMemoryError: a whole video does not fit.
    """
    policy, device = session.policy, session.mesh.device

    def scores(row: int) -> dict[str, Tensor]:
        video = slice(row, row + 1)
        rows, clean = trajectory.prompt_rows[video], trajectory.latents[video, -1].to(device).float()
        conditioning = rows_of(prompts.conditioning, rows, device)
        decoded, sound = policy.decode(clean, conditioning), policy.decode_audio(clean, conditioning)
        chunk = RolloutChunk((), decoded, rows, trajectory.sample_index[video], sound)
        return {name: found[:, 0] for name, found in session.suite.score(chunk, prompts).videos.items()}

    rows = range(min(VIDEOS, len(trajectory)))
    with session.suite.on_device():
        tiled = [scores(row) for row in rows]
        with whole_videos(policy.pipeline.vae):
            whole = [scores(row) for row in rows]
    return {
        name: torch.cat([one[name] - other[name] for one, other in zip(tiled, whole, strict=True)]) for name in tiled[0]
    }
