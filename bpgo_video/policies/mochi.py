"""How does Mochi 1 (github.com/genmoai/mochi) fit the policy protocol? Its time and its velocity run the other way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.diffusion import sde
from bpgo_video.policies.pipeline_policy import PipelinePolicy
from bpgo_video.types import Conditioning, Latents, Velocity, Videos

THRESHOLD_NOISE = (
    0.025  # of the schedule, in diffusers' pipeline as in the authors' code: its first half ends at 1 - this
)
DEFAULT_SIZE = {"height": 480, "width": 848}  # what diffusers' pipeline sets


class MochiPolicy(PipelinePolicy):
    """Mochi text-to-video."""

    pipeline_name = "MochiPipeline"
    block_names = ("MochiTransformerBlock",)
    fps = 30.0
    one_dtype = True

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` of T5 and the `mask` of real tokens; one by one: an empty text may blank its whole batch."""
        rows = [
            self.pipeline.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
            )
            for text in texts
        ]
        return {"prompt_embeds": torch.cat([row[0] for row in rows]), "mask": torch.cat([row[1] for row in rows])}

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        temporal, spatial = (math.prod(self.vae_config[f"{axis}_expansions"]) for axis in ("temporal", "spatial"))
        self.check_size(video, temporal, spatial * self.transformer_config["patch_size"])
        frames = (video.num_frames - 1) // temporal + 1
        return self.vae_config["latent_channels"], frames, video.height // spatial, video.width // spatial

    def call_defaults(self) -> dict[str, int]:
        return DEFAULT_SIZE

    def example(self) -> tuple[Latents, Conditioning]:
        config, generator = self.transformer_config, torch.Generator().manual_seed(0)
        side = 2 * config["patch_size"]
        latents = torch.randn(1, config["in_channels"], 2, side, side, generator=generator)
        texts = torch.randn(1, 4, config["text_embed_dim"], generator=generator)
        return latents, {"prompt_embeds": texts, "mask": torch.tensor([[True, True, True, False]])}

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        own = self.pipeline.scheduler.config["shift"] if shift is None else shift
        levels = torch.tensor(linear_quadratic_schedule(num_steps, THRESHOLD_NOISE), dtype=torch.float64)
        return torch.cat([sde.flow_shift(levels, own), levels.new_zeros(1)]).float()

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        texts = conditioning["prompt_embeds"]
        timestep = (1 - sigma.to(latents.device)) * self.pipeline.scheduler.config.num_train_timesteps
        prediction: Tensor = self.transformers(
            self.transformer_at(float(sigma.max())),
            hidden_states=latents.to(texts.dtype),
            encoder_hidden_states=texts,
            timestep=timestep.expand(len(latents)).to(texts.dtype),
            encoder_attention_mask=conditioning["mask"],
            return_dict=False,
        )[0]
        return -prediction.float()  # it predicts data - noise

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, by channel, its scale included."""
        config = self.vae_config
        mean, std = (torch.tensor(config[f"latents_{name}"], device=device) for name in ("mean", "std"))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1) / config["scaling_factor"]

    @torch.no_grad()
    def encode_video(self, videos: Videos) -> Latents:
        vae: Any = self.pipeline.vae
        pixels = (2 * videos - 1).transpose(1, 2).to(vae.device, vae.dtype)
        encoded = vae.encode(pixels).latent_dist.mode().float()
        mean, std = self._statistics(encoded.device)
        return (encoded - mean) / std

    @torch.no_grad()
    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        vae: Any = self.pipeline.vae
        mean, std = self._statistics(latents.device)
        scaled = latents * std + mean
        pixels = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
