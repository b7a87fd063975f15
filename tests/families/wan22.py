"""Wan 2.2: two experts for text-to-video and image-to-video, and the 5B policy with one noise level per token."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.families.wan import VIDEO, euler
from tests.made.random_wan import TEXT_TOKENS, random_wan

BOUNDARY = 0.875  # of T2V-A14B
SMALL_VIDEO = VideoConfig(num_frames=9, height=96, width=96, fps=8.0)  # 27 tokens: an odd number for two ranks


def random_experts(folder: Path, images: bool = False) -> Path:
    """A pipeline of two transformers with different weights."""
    with TemporaryDirectory() as scratch:
        high, low = (read(random_wan(Path(scratch) / str(seed), seed=seed, images=images)) for seed in (0, 1))
    parts = {**high.components, "transformer_2": low.transformer}
    type(high)(**parts, boundary_ratio=BOUNDARY).save_pretrained(folder)
    return folder


def random_ti2v(folder: Path) -> Path:
    """A small TI2V-5B: a residual VAE with a factor of 16 x 16 pixels, and latents without normalisation."""
    with TemporaryDirectory() as scratch:
        pipeline = read(random_wan(Path(scratch)))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        vae = AutoencoderKLWan(
            base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
            temperal_downsample=[False, True, True], in_channels=12, out_channels=12, patch_size=2,
            scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 0.8, 1.5, 1.2],
        )  # fmt: skip
    type(pipeline)(**{**pipeline.components, "vae": vae}, expand_timesteps=True).save_pretrained(folder)
    return folder


def read(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder)


WAN_22 = Case(random_experts, VIDEO, TEXT_TOKENS, guidance_scale_2=2.0, euler=euler)
WAN_22_IMAGE = Case(
    partial(random_experts, images=True), VIDEO, TEXT_TOKENS, guidance_scale_2=2.0, euler=euler
)  # fmt: skip
WAN_22_TI2V = Case(random_ti2v, SMALL_VIDEO, TEXT_TOKENS, euler=euler)
WAN_22_TI2V_IMAGE = Case(random_ti2v, SMALL_VIDEO, TEXT_TOKENS, family="WanImageToVideoPipeline", euler=euler)
