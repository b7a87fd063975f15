"""How does CogVideoX image-to-video (arXiv 2408.06072) fit the policy protocol? Its image is further channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.policies.cogvideox import CogVideoXPolicy
from bpgo_video.types import Conditioning, Latents

OFFSET = 2.0  # what diffusers' pipeline tells CogVideoX 1.5


class CogVideoXImagePolicy(CogVideoXPolicy):
    """CogVideoX image-to-video: the image's latents, then zeros, are further channels of the noisy ones.

    They are the mean of the VAE's distribution, so that all ranks and samples see the same; diffusers draws from it.
    """

    pipeline_name = "CogVideoXImageToVideoPipeline"
    takes_images = True

    def call_defaults(self) -> dict[str, int]:
        """Of height and width: the call has a number of frames."""
        return {name: size for name, size in super().call_defaults().items() if name != "num_frames"}

    def transformer_input(self, noisy: Latents, conditioning: Conditioning) -> Tensor:
        return torch.cat([noisy, conditioning["image_latents"].to(noisy.dtype)], dim=1)

    def transformer_arguments(self, latents: Latents) -> dict[str, Tensor]:
        return {} if self.transformer_config["ofs_embed_dim"] is None else {"ofs": latents.new_full((1,), OFFSET)}

    def example(self) -> tuple[Latents, Conditioning]:
        latents, conditioning = super().example()
        image = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        return latents, {**conditioning, "image_latents": image}

    @torch.no_grad()
    def image_conditioning(
        self, images: Float[Tensor, "prompts 3 height width"], video: VideoConfig
    ) -> dict[str, Tensor]:
        """`image_latents`, as many frames as are sampled, the first of them the image's."""
        vae = self.pipeline.vae
        pixels = (2 * images - 1)[:, :, None].to(vae.device, vae.dtype)
        first = torch.cat([vae.encode(image[None]).latent_dist.mode() for image in pixels])
        factor = self.vae_config["scaling_factor"]
        first = first / factor if self.vae_config["invert_scale_latents"] else first * factor  # as each was trained
        frames = self.latent_shape(video)[1]
        return {"image_latents": F.pad(first, (0, 0, 0, 0, 0, frames - 1))}
