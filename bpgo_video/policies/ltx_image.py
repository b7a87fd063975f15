"""How does LTX-Video image-to-video (arXiv 2501.00103) fit the policy protocol? Its first latent frame is the image.

The other frames are sampled. The transformer sees the given frame in front of them, at noise level 0 of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.ltx import DECODE_NOISE, LTXPolicy, Whole
from bpgo_video.randomness import generator_of
from bpgo_video.types import Conditioning, Latents

Images = Float[Tensor, "prompts 3 height width"]


class LTXImagePolicy(LTXPolicy):
    """`LTXPolicy` whose videos begin with an image."""

    pipeline_name = "LTXImageToVideoPipeline"
    takes_images = True
    given_frames = 1
    one_dtype = True

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        shape = super().latent_shape(video)
        if shape[1] == 0:
            raise ConfigError(
                f"video.num_frames is {video.num_frames}: the image is the only latent frame, and nothing is left to "
                f"sample; take {self.strides[0] + 1} frames or more"
            )
        return shape

    def example(self) -> tuple[Latents, Conditioning]:
        latents, conditioning = super().example()
        return latents[:, :, 1:], {**conditioning, "image_latents": latents[:, :, :1]}

    @torch.no_grad()
    def image_conditioning(self, images: Images, video: VideoConfig) -> dict[str, Tensor]:
        """`image_latents`, the given frame: the mode of the VAE's distribution, from which the pipeline draws."""
        return {"image_latents": self.clean_latents(self.pipeline.vae, images[:, None])}

    def whole(self, latents: Latents, conditioning: Conditioning) -> Whole:
        """The given frame and the sampled ones."""
        return torch.cat([conditioning["image_latents"].to(latents.dtype), latents], dim=2)

    def timesteps(self, sigma: Tensor, whole: Whole) -> Tensor:
        """The noise level of each token: none of the given frame's."""
        noisy = torch.ones(whole.shape[2:], device=whole.device)
        noisy[: self.given_frames] = 0
        return super().timesteps(sigma, whole)[:, None] * noisy.flatten()

    @torch.no_grad()
    def call_arguments(
        self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None
    ) -> dict[str, Any]:
        """The pipeline takes the image for what stands in front of the noise, where it is given noise."""
        assert images is not None
        device = pipeline._execution_device  # networks that are offloaded say that they are elsewhere
        given = self.clean_latents(pipeline.vae, images[:, None], device).to(latents.device)
        arguments = super().call_arguments(pipeline, torch.cat([given, latents], dim=2), video, images)
        seed = generator_of(*DECODE_NOISE).initial_seed()
        return {**arguments, "generator": torch.Generator(device).manual_seed(seed)}
