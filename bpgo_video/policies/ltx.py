"""LTX-Video text-to-video and image-to-video (arXiv 2501.00103).

The transformer takes tokens of one latent pixel each and the frame rate, since its rotary embeddings count seconds.
From 0.9.1 on the VAE removes the last noise while it decodes. That noise is the same for every video, so that two
samples of a prompt differ only by the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.policies.attention import SequencePlan, split_rope
from bpgo_video.policies.base import AllFrames, Arguments, Images, Policy, Shapes
from bpgo_video.policies.schedule import sigmas_by_size
from bpgo_video.randomness import FixedDraws, generator_of, keyed_noise
from bpgo_video.types import Conditioning, Latents, Velocity, Videos

DECODE_NOISE = ("decode",)  # key of the noise that the VAE removes


class LTXPolicy(Policy):
    """LTX-Video text-to-video."""

    pipeline_name = "LTXPipeline"
    block_names = ("LTXVideoTransformerBlock",)
    fps = 25.0
    options = MappingProxyType({"decode_timestep": 0.0, "decode_noise_scale": None})
    sequence_plan = SequencePlan(
        blocks=("transformer_blocks",), rope=split_rope("rope", dim=1), head="proj_out", local_attention=("attn2",)
    )

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """T5's states and the mask of real tokens."""
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}

    def video_conditioning(self, video: VideoConfig) -> dict[str, Tensor]:
        """`frame_rate`, frames per second."""
        return {"frame_rate": torch.tensor([video.fps])}

    def text_shapes(self, text_tokens: int) -> Shapes:
        texts = (text_tokens, self.transformer_config["caption_channels"])
        return {"prompt_embeds": texts, "prompt_attention_mask": (text_tokens,)}

    @property
    def strides(self) -> tuple[int, int]:
        config = self.vae_config
        scale = 2 ** sum(config["spatio_temporal_scaling"])
        temporal = config.get("temporal_compression_ratio") or config["patch_size_t"] * scale
        spatial = config.get("spatial_compression_ratio") or config["patch_size"] * scale
        return temporal, spatial

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        """The default shift grows with the number of tokens."""
        _, frames, height, width = self.latent_shape(video)
        tokens = (frames + self.given_frames) * height * width
        return sigmas_by_size(self.pipeline.scheduler, num_steps, tokens, shift)

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        frames = self.all_frames(latents, conditioning)
        grid, texts = frames.shape[2:], conditioning["prompt_embeds"]
        temporal, spatial = self.strides
        seconds = temporal / conditioning["frame_rate"].view(-1, 1, 1, 1, 1)  # the length of a latent frame
        prediction = self.predict(
            sigma,
            hidden_states=frames.flatten(2).mT.to(texts.dtype),
            timestep=self.timesteps(latents, sigma),
            encoder_hidden_states=texts,
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            num_frames=grid[0],
            height=grid[1],
            width=grid[2],
            rope_interpolation_scale=(seconds, spatial, spatial),
        )[0]
        return prediction.float().mT.unflatten(2, grid)[:, :, self.given_frames :]

    def latent_statistics(self, vae: Any, device: torch.device) -> tuple[Tensor, Tensor, float]:
        """The statistics are buffers of the VAE."""
        mean, std = (buffer.view(1, -1, 1, 1, 1).to(device) for buffer in (vae.latents_mean, vae.latents_std))
        return mean, std, vae.config.scaling_factor

    def decode_frames(self, latents: AllFrames) -> Videos:
        vae, clean, timestep = self.pipeline.vae, self.denormalised(latents), None
        if vae.config.timestep_conditioning:
            level, scale = self.decode_options
            noise = keyed_noise(clean.shape[1:], [DECODE_NOISE], clean.device)
            clean = (1 - scale) * clean + scale * noise
            timestep = clean.new_full((len(clean),), level, dtype=vae.dtype)
        with FixedDraws():
            return self.vae_pixels(clean, timestep)

    @property
    def decode_options(self) -> tuple[float, float]:
        """The timestep at which the VAE decodes, and the scale of the added noise, as in the pipeline's call."""
        level, scale = self.options["decode_timestep"] or 0.0, self.options["decode_noise_scale"]
        return level, level if scale is None else scale

    def call_arguments(self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None) -> Arguments:
        """Tokens, the frame rate, and how the VAE decodes: every video with the noise that `decode` adds."""
        level, scale = self.decode_options
        return {
            "latents": self.call_frames(pipeline, latents, images).flatten(2).mT,
            "frame_rate": video.fps,
            "decode_timestep": level,
            "decode_noise_scale": scale,
            "generator": [generator_of(*DECODE_NOISE) for _ in latents],
        }


class LTXImagePolicy(LTXPolicy):
    """LTX-Video image-to-video: the first latent frame is the image, at timestep 0."""

    pipeline_name = "LTXImageToVideoPipeline"
    takes_images = True
    given_frames = 1
    token_timesteps = True
    one_dtype = True

    def call_arguments(self, pipeline: Any, latents: Latents, video: VideoConfig, images: Images | None) -> Arguments:
        """This pipeline takes a single generator, on the device that computes."""
        seed = generator_of(*DECODE_NOISE).initial_seed()
        generator = torch.Generator(pipeline._execution_device).manual_seed(seed)
        return {**super().call_arguments(pipeline, latents, video, images), "generator": generator}
