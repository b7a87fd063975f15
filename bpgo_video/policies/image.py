"""Text-to-image families: an image is a video of one frame, so latents are [samples, channels, 1, height, width]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.base import AllFrames, Arguments, Images, LatentShape, Policy
from bpgo_video.policies.schedule import sigmas_by_size
from bpgo_video.types import Conditioning, Latents, Velocity, Videos

Tokens = Float[Tensor, "samples tokens packed"]
TIMESTEP_UNIT = 1000  # of the pipelines; the transformers multiply by it again
SIDE = 128  # latent pixels in a side of the default image, where the transformer's config names none


class ImagePolicy(Policy):
    """A pipeline that makes images. `fps` only fills the field of that name."""

    fps = 1.0

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        if video.num_frames != 1:
            raise ConfigError(
                f"video.num_frames is {video.num_frames}, but {self.pipeline_name} makes images; set it to 1"
            )
        return super().latent_shape(video)

    def example_shape(self) -> LatentShape:
        channels, _, height, width = super().example_shape()
        return channels, 1, height, width

    def call_defaults(self) -> dict[str, int]:
        side = self.transformer_config.get("sample_size", SIDE) * self.strides[1]
        return {"num_frames": 1, "height": side, "width": side}

    def take_settings(self, pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        taken = super().take_settings(pipeline, settings)
        return {name: value for name, value in taken.items() if name != "num_frames"}

    def call_frames(self, pipeline: Any, latents: Latents, images: Images | None) -> Tensor:
        return latents[:, :, 0]

    def videos_of(self, output: Any) -> Videos:
        images: Images = output.images
        return images[:, None]


class FlatVAE(Policy):
    """diffusers' AutoencoderKL: its pixels and latents have no axis of frames."""

    @property
    def strides(self) -> tuple[int, int]:
        return 1, 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def latent_statistics(self, vae: Any, device: torch.device) -> tuple[float, float, float]:
        return self.vae_config["shift_factor"] or 0.0, 1.0, self.vae_config["scaling_factor"]

    def vae_latents(self, vae: Any, videos: Videos, device: torch.device | None = None) -> AllFrames:
        pixels = (2 * videos[:, 0] - 1).to(device or vae.device, vae.dtype)
        return torch.cat([vae.encode(image).latent_dist.mode().float() for image in pixels.split(1)])[:, :, None]

    def vae_pixels(self, latents: AllFrames, *arguments: Any) -> Videos:
        vae = self.pipeline.vae
        pixels = vae.decode(latents[:, :, 0].to(vae.dtype), *arguments, return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)[:, None]

    def decoded_shape(self, latents: LatentShape) -> tuple[int, ...]:
        channels, _, height, width = latents
        return channels, height, width


class PackedImagePolicy(ImagePolicy):
    """A token is 2 x 2 latent pixels, packed into channels before the transformer; its timestep is sigma."""

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, 2, 2

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        """The default shift is the scheduler's, which may grow with the number of tokens."""
        _, _, height, width = self.latent_shape(video)
        return sigmas_by_size(self.pipeline.scheduler, num_steps, height // 2 * (width // 2), shift)

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        """The timestep is rounded as in the pipelines: to the transformer's dtype, before it is divided."""
        rounded = self.timesteps(latents, sigma).to(conditioning["prompt_embeds"].dtype)
        return {"timestep": rounded / TIMESTEP_UNIT}

    def hidden_states(self, latents: Latents, conditioning: Conditioning) -> Tokens:
        return packed(latents)

    def sampled_frames(self, prediction: Tokens, latents: Latents) -> Velocity:
        return unpacked(prediction, rows=self.grid(latents)[1])

    def call_frames(self, pipeline: Any, latents: Latents, images: Images | None) -> Tokens:
        return packed(latents)


def packed(latents: Latents) -> Tokens:
    """Tokens of 2 x 2 latent pixels, row by row; their channels are those of a pixel times 4."""
    pixels = latents[:, :, 0].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # channels, rows, 2, columns, 2
    return pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tokens, rows: int) -> Latents:
    """The inverse of `packed`."""
    pixels = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, -1))  # rows, columns, channels, 2, 2
    return pixels.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)[:, :, None]
