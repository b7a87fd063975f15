"""How does Kandinsky 5 image-to-video (arXiv 2511.14993) fit the policy protocol? Its first latent frame is the image.

The others are sampled. A mask tells the transformer which is given; the noise level that it is told is the others'.
Before decoding, the pipeline moves mean and spread of the first frames towards those behind them; so does `decode`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.kandinsky5 import Kandinsky5Policy, Whole
from bpgo_video.types import Conditioning, Latents, Videos

ADJUSTED_FRAMES = 4  # latent frames whose mean and spread follow those behind them, so that there must be one behind
Images = Float[Tensor, "prompts 3 height width"]


class Kandinsky5ImagePolicy(Kandinsky5Policy):
    """`Kandinsky5Policy` whose videos begin with an image."""

    pipeline_name = "Kandinsky5I2VPipeline"
    takes_images = True
    given_frames = 1

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        channels, frames, height, width = super().latent_shape(video)
        if frames <= ADJUSTED_FRAMES:
            least = ADJUSTED_FRAMES * self.vae_config["temporal_compression_ratio"] + 1
            raise ConfigError(
                f"video.num_frames is {video.num_frames}, {frames} latent frames: the pipeline adjusts the first "
                f"{ADJUSTED_FRAMES} to those behind them; take {least} frames or more"
            )
        return channels, frames - self.given_frames, height, width

    def example(self) -> tuple[Latents, Conditioning]:
        latents, conditioning = super().example()
        samples, channels, _, *side = latents.shape
        size = (samples, channels, ADJUSTED_FRAMES + 1, *side)
        whole = torch.randn(size, generator=torch.Generator().manual_seed(1))
        return whole[:, :, self.given_frames :], {**conditioning, "image_latents": whole[:, :, : self.given_frames]}

    @torch.no_grad()
    def image_conditioning(self, images: Images, video: VideoConfig) -> dict[str, Tensor]:
        """`image_latents`, the given frame: the mode of the VAE's distribution, from which the pipeline draws."""
        return {"image_latents": self.clean_latents(self.pipeline.vae, images[:, None])}

    def whole(self, latents: Latents, conditioning: Conditioning) -> Whole:
        """The given frame and the sampled ones."""
        return torch.cat([conditioning["image_latents"].to(latents), latents], dim=2)

    def encode_video(self, videos: Videos) -> Latents:
        return super().encode_video(videos)[:, :, self.given_frames :]

    @torch.no_grad()
    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        channels_last = self.whole(latents, conditioning).movedim(1, -1)
        adjusted = [self.pipeline.normalize_first_frame(sample) for sample in channels_last.split(1)]
        return super().decode(torch.cat(adjusted).movedim(-1, 1), conditioning)

    def call_arguments(
        self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None
    ) -> dict[str, Any]:
        """The pipeline takes the image for what stands in front of the noise, where it is given noise."""
        assert images is not None
        device = pipeline._execution_device  # networks that are offloaded say that they are elsewhere
        given = self.clean_latents(pipeline.vae, images[:, None], device).to(latents.device)
        return super().call_arguments(pipeline, torch.cat([given, latents], dim=2), video, images)
