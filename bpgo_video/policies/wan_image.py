"""How does Wan image-to-video (Wan 2.1, arXiv 2503.20314) fit the policy protocol? As text-to-video, with more inputs.

Beside the noisy latents the transformer sees, as further channels, which frames are given and the latents of a video
that is the image and then grey; folders with a CLIP image encoder also attend to its features.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config import VideoConfig
from bpgo_video.policies.wan import WanPolicy
from bpgo_video.types import Conditioning, Latents


class WanImagePolicy(WanPolicy):
    """`WanPolicy` whose videos continue an image."""

    pipeline_name = "WanImageToVideoPipeline"
    takes_images = True

    def transformer_input(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        return torch.cat([latents, conditioning["image_latents"].to(latents.dtype)], dim=1)

    def example(self) -> tuple[Latents, Conditioning]:
        latents, conditioning = super().example()
        config, generator = self.transformer_config, torch.Generator().manual_seed(1)
        more = config["in_channels"] - latents.shape[1]
        images = {"image_latents": torch.randn(1, more, *latents.shape[2:], generator=generator)}
        if config.get("image_dim"):
            images["image_embeds"] = torch.randn(1, 4, config["image_dim"], generator=generator)
        return latents, {**conditioning, **images}

    @torch.no_grad()
    def image_conditioning(
        self, images: Float[Tensor, "prompts 3 height width"], video: VideoConfig
    ) -> dict[str, Tensor]:
        """`image_latents`: a mask of given frames, `temporal stride` channels, and the image's latents; `image_embeds`:
        CLIP's features, where the folder has its encoder."""
        latents = torch.cat([self._image_latents(image, video) for image in images[:, None]])
        if self.pipeline.image_encoder is None:
            return {"image_latents": latents}
        return {"image_latents": latents, "image_embeds": self._image_embeds(images)}

    def _image_latents(self, image: Float[Tensor, "1 3 height width"], video: VideoConfig) -> Tensor:
        vae: Any = self.pipeline.vae
        pixels = torch.zeros(1, 3, video.num_frames, *image.shape[2:])
        pixels[:, :, 0] = 2 * image - 1
        encoded = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        mean, std = self.latent_statistics(encoded.device)
        mask = encoded.new_zeros(1, self.vae_config["scale_factor_temporal"], *encoded.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, (encoded - mean) / std], dim=1)

    def _image_embeds(self, images: Float[Tensor, "prompts 3 height width"]) -> Tensor:
        encoder = self.pipeline.image_encoder
        pictures = list((images * 255).round().to(torch.uint8).cpu().numpy())
        pixels = self.pipeline.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return encoder(pixels.to(encoder.device, encoder.dtype), output_hidden_states=True).hidden_states[-2]
