"""How does Wan text-to-video (2.1, arXiv 2503.20314, and 2.2) fit the policy protocol?

Wan 2.2's 14B policies have two experts, `transformer` at high noise and `transformer_2` at low. The 5B one is told a
noise level for each token; without a given image all are one, which is said once for each sample: the same function,
and no modulation of every token to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.diffusion import sde
from bpgo_video.policies.pipeline_policy import PipelinePolicy
from bpgo_video.policies.transformers import read_index, transformer_names
from bpgo_video.types import Conditioning, Latents, Velocity, Videos


class WanPolicy(PipelinePolicy):
    """Wan's pipeline parts."""

    pipeline_name = "WanPipeline"
    block_names = ("WanTransformerBlock",)
    fps = 16.0

    @classmethod
    def check(cls, folder: Path) -> None:
        """Two experts need a boundary between them.

        Raises:
            ConfigError: one of both is there without the other.
        """
        names, boundary = transformer_names(folder), read_index(folder).get("boundary_ratio")
        if (boundary is None) != (len(names) == 1):
            raise ConfigError(
                f"{folder} has {list(names)} and boundary_ratio {boundary}; two transformers need a boundary_ratio in "
                "model_index.json, and one transformer none"
            )

    def transformer_at(self, sigma: float) -> str:
        """The high-noise expert from the boundary on, compared in fp32, as the pipeline does."""
        boundary = self.pipeline.config.boundary_ratio
        if boundary is None:
            return self.transformer_names[0]
        train_timesteps = self.pipeline.scheduler.config.num_train_timesteps
        is_high = torch.tensor(sigma, dtype=torch.float32) * train_timesteps >= boundary * train_timesteps
        return "transformer" if bool(is_high) else "transformer_2"

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        embeddings, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings}

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        temporal, spatial = self.vae_config["scale_factor_temporal"], self.vae_config["scale_factor_spatial"]
        patch = self.transformer_config["patch_size"][-1]  # as high as wide
        self.check_size(video, temporal, spatial * patch)
        channels = self.vae_config["z_dim"]
        frames = (video.num_frames - 1) // temporal + 1
        return channels, frames, video.height // spatial, video.width // spatial

    def example(self) -> tuple[Latents, Conditioning]:
        config, generator = self.transformer_config, torch.Generator().manual_seed(0)
        frames, height, width = config["patch_size"]
        latents = torch.randn(1, self.vae_config["z_dim"], 2 * frames, 2 * height, 2 * width, generator=generator)
        texts = torch.randn(1, 4, config["text_dim"], generator=generator)
        return latents, {"prompt_embeds": texts}

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        scheduler = self.pipeline.scheduler.config
        own = scheduler.get("flow_shift", scheduler.get("shift", 1.0))
        return sde.shifted_sigmas(num_steps, own if shift is None else shift)

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        dtype = conditioning["prompt_embeds"].dtype
        prediction = self.transformers(
            self.transformer_at(float(sigma.max())),
            hidden_states=self.transformer_input(latents, conditioning).to(dtype),
            timestep=self.timesteps(latents, sigma),
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_image=conditioning.get("image_embeds"),
            return_dict=False,
        )[0]
        return prediction[:, :, self.given_frames :].float()

    def timesteps(self, latents: Latents, sigma: Tensor) -> Tensor:
        """The noise level in the transformer's units: [samples], or [samples, tokens]."""
        train_timesteps = self.pipeline.scheduler.config.num_train_timesteps
        return (sigma.to(latents.device) * train_timesteps).expand(latents.shape[0])

    def transformer_input(self, latents: Latents, conditioning: Conditioning) -> Tensor:
        """What enters the first layer: here the noisy latents alone."""
        return latents

    def latent_statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, by channel: the policy's latents have 0 and 1."""
        config = self.vae_config
        mean, std = (torch.tensor(config[f"latents_{name}"], device=device) for name in ("mean", "std"))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode_video(self, videos: Videos) -> Latents:
        vae = self.pipeline.vae
        pixels = (2 * videos - 1).transpose(1, 2).to(vae.device, vae.dtype)
        encoded = vae.encode(pixels).latent_dist.mode()
        mean, std = self.latent_statistics(encoded.device)
        return ((encoded - mean) / std).float()

    @torch.no_grad()
    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        vae = self.pipeline.vae
        mean, std = self.latent_statistics(latents.device)
        pixels = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
