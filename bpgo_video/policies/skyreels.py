"""SkyReels-V2 (arXiv 2504.13074): text-to-video, image-to-video, and text-to-video by diffusion forcing.

A diffusion-forcing transformer takes a timestep for each latent frame. diffusers' pipeline denoises all frames together
by default (ar_step 0): their timesteps are equal, so one for each sample is passed, the same function with a smaller
modulation. Staggered frames (ar_step above 0) and videos in overlapping parts (overlap_history) are not sampled here.
"""

from __future__ import annotations

import warnings
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.policies.attention import SequencePlan, split_rope
from bpgo_video.policies.base import Arguments, Images
from bpgo_video.policies.wan import WanImagePolicy, WanPolicy
from bpgo_video.types import Conditioning, Latents

SLOW_FPS = 16  # of two frame rates that a transformer may know; every other rate is the second, as in the pipeline
PLAN = SequencePlan(
    blocks=("blocks",), rope=split_rope("rope", dim=1), head="proj_out", local_attention=("attn2",)
)  # fmt: skip
# The transformer copies its frame rates with torch.tensor, which warns of tensors.
warnings.filterwarnings("ignore", "To copy construct from a tensor", module=r"diffusers\..*transformer_skyreels_v2")


class SkyReelsPolicy(WanPolicy):
    """SkyReels-V2 text-to-video."""

    pipeline_name = "SkyReelsV2Pipeline"
    block_names = ("SkyReelsV2TransformerBlock",)
    fps = 24.0
    sequence_plan = PLAN


class SkyReelsImagePolicy(WanImagePolicy):
    """SkyReels-V2 image-to-video: the image as Wan 2.1 takes it, with its CLIP features."""

    pipeline_name = "SkyReelsV2ImageToVideoPipeline"
    block_names = ("SkyReelsV2TransformerBlock",)
    fps = 24.0
    sequence_plan = PLAN


class DiffusionForcingPolicy(SkyReelsPolicy):
    """SkyReels-V2 text-to-video by diffusion forcing, all frames at one noise level."""

    pipeline_name = "SkyReelsV2DiffusionForcingPipeline"
    whole_timesteps = True
    one_video_a_call = True  # diffusers' code for the frame rate fails on a batch
    required_settings = MappingProxyType({"transformer": {"num_frame_per_block": (1,)}})  # others attend by blocks

    def timesteps(self, latents: Latents, sigma: Tensor) -> Tensor:
        return super().timesteps(latents, sigma).floor()

    def video_conditioning(self, video: VideoConfig) -> dict[str, Tensor]:
        """`frame_rate`: 0 for 16 frames a second and 1 for others, where the transformer takes it."""
        if not self.transformer_config["inject_sample_info"]:
            return {}
        return {"frame_rate": torch.tensor([float(video.fps != SLOW_FPS)])}

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        return {"fps": conditioning["frame_rate"].long()} if "frame_rate" in conditioning else {}

    def call_arguments(self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None) -> Arguments:
        """diffusers' pipeline fails on latents in its call, and writes into its latents: it gets a copy otherwise."""
        noise, frames = latents.to(pipeline._execution_device, torch.float32, copy=True), latents.shape[2]
        pipeline.prepare_latents = lambda *_, **__: (noise, frames, None, 0)
        return {"base_num_frames": video.num_frames, "fps": video.fps}
