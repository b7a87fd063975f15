"""How does LTX-Video text-to-video (arXiv 2501.00103) fit the policy protocol?

Its transformer takes tokens, a latent pixel each, and the frame rate, by which rotary embeddings count seconds. From
0.9.1 on its VAE decodes latents that still hold a little noise; the noise is the same for every video, so that nothing
but the policy tells two samples of a prompt apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.policies.flow_match import scheduled_sigmas
from bpgo_video.policies.pipeline_policy import PipelinePolicy
from bpgo_video.randomness import FixedDraws, generator_of, keyed_noise
from bpgo_video.types import Conditioning, Latents, Velocity, Videos

DECODE_NOISE = ("decode",)  # its key
Whole = Float[Tensor, "samples channels all_frames latent_height latent_width"]  # given frames and sampled ones


class LTXPolicy(PipelinePolicy):
    """LTX-Video's pipeline parts."""

    pipeline_name = "LTXPipeline"
    block_names = ("LTXVideoTransformerBlock",)
    fps = 25.0
    options = MappingProxyType({"decode_timestep": 0.0, "decode_noise_scale": None})

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}

    def video_conditioning(self, video: VideoConfig) -> dict[str, Tensor]:
        """`frame_rate`, frames a second."""
        return {"frame_rate": torch.tensor([video.fps])}

    @property
    def strides(self) -> tuple[int, int]:
        """Video frames in a latent frame, and pixels in a latent pixel's side."""
        config = self.vae_config
        scale = 2 ** sum(config["spatio_temporal_scaling"])
        temporal = config.get("temporal_compression_ratio") or config["patch_size_t"] * scale
        spatial = config.get("spatial_compression_ratio") or config["patch_size"] * scale
        return temporal, spatial

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        temporal, spatial = self.strides
        self.check_size(video, temporal, spatial)
        frames = (video.num_frames - 1) // temporal + 1 - self.given_frames
        return self.vae_config["latent_channels"], frames, video.height // spatial, video.width // spatial

    def example(self) -> tuple[Latents, Conditioning]:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, self.vae_config["latent_channels"], 2, 2, 2, generator=generator)
        texts = torch.randn(1, 4, self.transformer_config["caption_channels"], generator=generator)
        mask = torch.ones(1, 4, dtype=torch.bool)
        return latents, {
            "prompt_embeds": texts, "prompt_attention_mask": mask, "frame_rate": torch.tensor([self.fps])
        }  # fmt: skip

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        _, frames, height, width = self.latent_shape(video)
        config = self.pipeline.scheduler.config
        mu = calculate_shift(
            (frames + self.given_frames) * height * width,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        levels = np.linspace(1.0, 1 / num_steps, num_steps)
        return scheduled_sigmas(self.pipeline.scheduler, levels.tolist(), shift, mu)

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        whole = self.whole(latents, conditioning)
        grid, dtype = whole.shape[2:], conditioning["prompt_embeds"].dtype
        temporal, spatial = self.strides
        seconds = temporal / conditioning["frame_rate"].view(-1, 1, 1, 1, 1)  # that a latent frame lasts
        prediction = self.transformers(
            self.transformer_at(float(sigma.max())),
            hidden_states=whole.flatten(2).mT.to(dtype),
            timestep=self.timesteps(sigma, whole),
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            num_frames=grid[0],
            height=grid[1],
            width=grid[2],
            rope_interpolation_scale=(seconds, spatial, spatial),
            return_dict=False,
        )[0]
        return prediction.float().mT.unflatten(2, grid)[:, :, self.given_frames :]

    def whole(self, latents: Latents, conditioning: Conditioning) -> Whole:
        """The latents of all frames, from those that are sampled: here the same."""
        return latents

    def timesteps(self, sigma: Tensor, whole: Whole) -> Tensor:
        """The noise level as the transformer takes it, for each sample."""
        return (sigma.to(whole.device) * self.pipeline.scheduler.config.num_train_timesteps).expand(len(whole))

    @torch.no_grad()
    def encode_video(self, videos: Videos) -> Latents:
        return self.clean_latents(self.pipeline.vae, videos)[:, :, self.given_frames :]

    def clean_latents(self, vae: Any, videos: Videos, device: torch.device | None = None) -> Whole:
        """Of pixels in [0, 1]: the mode of the VAE's distribution, normalised.

        Args:
            device: where the VAE works; None where its weights are.
        """
        pixels = (2 * videos - 1).transpose(1, 2).to(device or vae.device, vae.dtype)
        encoded = torch.cat([vae.encode(one).latent_dist.mode().float() for one in pixels.split(1)])
        statistics = (vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        normalised: Whole = self.pipeline._normalize_latents(encoded, *statistics)
        return normalised

    @torch.no_grad()
    def decode(self, latents: Latents, conditioning: Conditioning) -> Videos:
        vae = self.pipeline.vae
        statistics = (vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        clean = self.pipeline._denormalize_latents(self.whole(latents, conditioning), *statistics)
        level, scale = self.decode_options
        timestep = None
        if vae.config.timestep_conditioning:
            noise = keyed_noise(clean.shape[1:], [DECODE_NOISE], clean.device)
            clean = (1 - scale) * clean + scale * noise
            timestep = clean.new_full((len(clean),), level, dtype=vae.dtype)
        with FixedDraws():
            pixels = vae.decode(clean.to(vae.dtype), timestep, return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    @property
    def decode_options(self) -> tuple[float, float]:
        """The level that the VAE decodes at, and how much noise is added for it, as the pipeline understands them."""
        level, scale = self.options["decode_timestep"] or 0.0, self.options["decode_noise_scale"]
        return level, level if scale is None else scale

    def call_arguments(
        self,
        pipeline: Any,
        latents: Latents,
        video: VideoConfig,
        images: Float[Tensor, "samples 3 height width"] | None,
    ) -> dict[str, Any]:
        """Tokens, the frame rate, and how the VAE decodes: each video with the noise that `decode` adds."""
        level, scale = self.decode_options
        return {
            "latents": latents.flatten(2).mT,
            "frame_rate": video.fps,
            "decode_timestep": level,
            "decode_noise_scale": scale,
            "generator": [generator_of(*DECODE_NOISE) for _ in latents],
        }
