"""How does HunyuanVideo 1.5 image-to-video (arXiv 2511.18870) fit the policy protocol?

The image is the first frame: its latents and a mask fill the further channels, and SigLIP's features are tokens beside
the texts'. The pipeline takes the size of the video from the image, among the sizes of its resolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.hunyuan15 import HunyuanVideo15Policy
from bpgo_video.types import Conditioning, Latents


class HunyuanVideo15ImagePolicy(HunyuanVideo15Policy):
    """`HunyuanVideo15Policy` whose videos continue an image."""

    pipeline_name = "HunyuanVideo15ImageToVideoPipeline"
    takes_images = True

    def bucket(self, height: int, width: int) -> tuple[int, int]:
        """One that the pipeline makes of a picture of its own size, too: rounded, some ratios fall to the next one."""
        sides = super().bucket(height, width)
        return sides if sides == (height, width) else self.bucket(*sides)

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        height, width = self.bucket(video.height, video.width)
        if (height, width) != (video.height, video.width):
            raise ConfigError(
                f"video.height is {video.height} and video.width {video.width}; of an image of this shape the pipeline "
                f"makes a video of {height} x {width}: set video.height to {height} and video.width to {width}"
            )
        return super().latent_shape(video)

    def take_settings(self, pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The image says the size."""
        taken = super().take_settings(pipeline, settings)
        return {name: value for name, value in taken.items() if name not in ("height", "width")}

    def example(self) -> tuple[Latents, Conditioning]:
        latents, conditioning = super().example()
        generator = torch.Generator().manual_seed(1)
        return latents, {
            **conditioning,
            "image_latents": torch.randn(latents[:, :, :1].shape, generator=generator),
            "image_embeds": torch.randn(1, 4, self.transformer_config["image_embed_dim"], generator=generator),
        }

    @torch.no_grad()
    def image_conditioning(
        self, images: Float[Tensor, "prompts 3 height width"], video: VideoConfig
    ) -> dict[str, Tensor]:
        """`image_latents`, [prompts, channels, 1, latent_height, latent_width], and `image_embeds` of SigLIP."""
        eight_bit = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        encoder = self.pipeline.image_encoder
        embeds = self.pipeline._get_image_embeds(
            encoder, self.pipeline.feature_extractor, [Image.fromarray(pixels) for pixels in eight_bit], encoder.device
        )
        latents = torch.cat([self.encode_video(image[None, None]) for image in images])
        return {"image_latents": latents, "image_embeds": embeds}

    def given_channels(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        """The image's latents and ones in the first frame, zeros behind it."""
        image = conditioning["image_latents"]
        first = torch.cat([image, torch.ones_like(image[:, :1])], dim=1)
        return F.pad(first, (0, 0, 0, 0, 0, latents.shape[2] - 1))

    def image_features(self, conditioning: Conditioning) -> Tensor:
        """SigLIP's."""
        return conditioning["image_embeds"]
