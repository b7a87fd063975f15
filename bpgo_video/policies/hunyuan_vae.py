"""How do videos become latents by HunyuanVideo's VAE (arXiv 2412.03603), which Kandinsky 5 takes, too, and by 1.5's?"""

from __future__ import annotations

from typing import Any

import torch

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.policies.pipeline_policy import PipelinePolicy
from bpgo_video.types import Conditioning, Latents, Videos


class HunyuanVAEPolicy(PipelinePolicy):
    """What policies of these VAEs share."""

    def compressed(self, video: VideoConfig, patch: int) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of all its latents.

        Args:
            patch: latent pixels in a side of the transformer's patches.

        Raises:
            ConfigError: a size that the strides of VAE and patches do not divide.
        """
        config = self.vae_config
        temporal, spatial = config["temporal_compression_ratio"], config["spatial_compression_ratio"]
        self.check_size(video, temporal, spatial * patch)
        frames = (video.num_frames - 1) // temporal + 1
        return config["latent_channels"], frames, video.height // spatial, video.width // spatial

    @torch.no_grad()
    def clean_latents(self, vae: Any, videos: Videos, device: torch.device | None = None) -> Latents:
        """The mode of what `vae` makes of pixels in [0, 1], scaled, in fp32.

        Args:
            device: where the VAE works; None where its weights are.
        """
        pixels = (2 * videos - 1).transpose(1, 2).to(device or vae.device, vae.dtype)
        return vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor

    def encode_video(self, videos: Videos) -> Latents:
        return self.clean_latents(self.pipeline.vae, videos)

    @torch.no_grad()
    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        vae = self.pipeline.vae
        pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
