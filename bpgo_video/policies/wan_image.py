"""How does Wan image-to-video (2.1, arXiv 2503.20314, and 2.2) fit the policy protocol? In one of two ways.

14B: beside the noisy latents the transformer sees, as further channels, which frames are given and the latents of a
video that is the image and then grey; folders with a CLIP image encoder (2.1) also attend to its features.
5B (2.2): the image is the first latent frame, clean, at noise level 0, and only the others are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.pipeline_policy import PipelinePolicy
from bpgo_video.policies.transformers import read_index
from bpgo_video.policies.wan import WanPolicy
from bpgo_video.types import Conditioning, Latents, Videos

TEXT_BESIDE_IMAGES = 512  # tokens: diffusers' attention takes all before the last 512 for the image's


class WanImagePolicy(WanPolicy):
    """`WanPolicy` whose videos continue an image."""

    pipeline_name = "WanImageToVideoPipeline"
    takes_images = True

    @classmethod
    def variant(cls, folder: Path) -> type[PipelinePolicy]:
        return WanFirstFramePolicy if read_index(folder).get("expand_timesteps") else cls

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds`.

        Raises:
            ConfigError: another number of tokens than the attention to CLIP's features can tell apart from them.
        """
        if self._attends_to_images and self.max_sequence_length != TEXT_BESIDE_IMAGES:
            raise ConfigError(
                f"policy.max_sequence_length is {self.max_sequence_length}, but this transformer takes the last "
                f"{TEXT_BESIDE_IMAGES} tokens for text and those before for the image's; set it to {TEXT_BESIDE_IMAGES}"
            )
        return super().encode(texts)

    @property
    def _attends_to_images(self) -> bool:
        return self.transformer_config["added_kv_proj_dim"] is not None

    def transformer_input(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        return torch.cat([latents, conditioning["image_latents"].to(latents.dtype)], dim=1)

    def example(self) -> tuple[Latents, Conditioning]:
        latents, conditioning = super().example()
        config, generator = self.transformer_config, torch.Generator().manual_seed(1)
        more = config["in_channels"] - latents.shape[1]
        images = {"image_latents": torch.randn(1, more, *latents.shape[2:], generator=generator)}
        if self._attends_to_images:
            images["image_embeds"] = torch.randn(1, 4, config["image_dim"], generator=generator)
            images["prompt_embeds"] = torch.randn(1, TEXT_BESIDE_IMAGES, config["text_dim"], generator=generator)
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
        frames = torch.full((1, video.num_frames, *image.shape[1:]), 0.5)
        frames[:, 0] = image
        latents = self.encode_video(frames)
        mask = latents.new_zeros(1, self.vae_config["scale_factor_temporal"], *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)

    def _image_embeds(self, images: Float[Tensor, "prompts 3 height width"]) -> Tensor:
        encoder = self.pipeline.image_encoder
        pictures = list((images * 255).round().to(torch.uint8).cpu().numpy())
        pixels = self.pipeline.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return encoder(pixels.to(encoder.device, encoder.dtype), output_hidden_states=True).hidden_states[-2]


class WanFirstFramePolicy(WanPolicy):
    """`WanPolicy` of a folder that knows a noise level for each token; the image's are 0."""

    pipeline_name = "WanImageToVideoPipeline"
    takes_images = True
    given_frames = 1

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        channels, frames, height, width = super().latent_shape(video)
        if frames == 1:
            raise ConfigError(
                f"video.num_frames is {video.num_frames}, and the image is the first of them: nothing would be "
                f"sampled; take {1 + self.vae_config['scale_factor_temporal']} or more"
            )
        return channels, frames - 1, height, width

    def example(self) -> tuple[Latents, Conditioning]:
        latents, conditioning = super().example()
        image = torch.randn(latents[:, :, :1].shape, generator=torch.Generator().manual_seed(1))
        return latents, {**conditioning, "image_latents": image}

    @torch.no_grad()
    def image_conditioning(
        self, images: Float[Tensor, "prompts 3 height width"], video: VideoConfig
    ) -> dict[str, Tensor]:
        """`image_latents`: the first latent frame, [prompts, channels, 1, latent_height, latent_width]."""
        encode = super().encode_video
        return {"image_latents": torch.cat([encode(image[None, None]) for image in images])}

    def encode_video(self, videos: Videos) -> Latents:
        return super().encode_video(videos)[:, :, self.given_frames :]

    def timesteps(self, latents: Latents, sigma: Tensor) -> Tensor:
        frames, height, width = (
            size // patch for size, patch in zip(latents.shape[2:], self.transformer_config["patch_size"], strict=True)
        )
        sampled = super().timesteps(latents, sigma)[:, None].expand(-1, frames * height * width)
        return torch.cat([sampled.new_zeros(len(latents), height * width), sampled], dim=1)

    def transformer_input(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        return torch.cat([conditioning["image_latents"].to(latents), latents], dim=2)

    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        return super().decode(self.transformer_input(latents, conditioning), conditioning)

    def call_arguments(
        self,
        pipeline: Any,
        latents: Latents,
        video: VideoConfig,
        images: Float[Tensor, "prompts 3 height width"] | None,
    ) -> dict[str, Any]:
        """The pipeline replaces the first frame of the noise by the image's."""
        return {"latents": torch.cat([torch.zeros_like(latents[:, :, :1]), latents], dim=2)}
