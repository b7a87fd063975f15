"""How does Kandinsky 5 text-to-video (arXiv 2511.14993) fit the policy protocol? Its latents have channels last.

Folders with `visual_cond` take channels for given frames beside the noisy ones; without an image all are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.policies.flow_match import scheduled_sigmas
from bpgo_video.policies.hunyuan_vae import HunyuanVAEPolicy
from bpgo_video.policies.kandinsky5_attention import PADDING
from bpgo_video.policies.kandinsky5_transformer import prepare
from bpgo_video.policies.pipeline_policy import networks_of, read_config
from bpgo_video.policies.transformers import transformer_names
from bpgo_video.types import Conditioning, Latents, Velocity

POSITIONS = 128  # of the transformer's tokens along each axis
Whole = Float[Tensor, "samples channels whole_frames latent_height latent_width"]  # given frames and sampled ones
ChannelsLast = Float[Tensor, "samples whole_frames latent_height latent_width more_channels"]


class Kandinsky5Policy(HunyuanVAEPolicy):
    """Kandinsky 5's pipeline parts."""

    pipeline_name = "Kandinsky5T2VPipeline"
    block_names = ("Kandinsky5TransformerEncoderBlock", "Kandinsky5TransformerDecoderBlock")
    fps = 24.0
    one_text_a_call = True

    def __init__(self, folder: Path, pipeline: Any, max_sequence_length: int):
        super().__init__(folder, pipeline, max_sequence_length)
        for transformer in self.transformers.values():
            prepare(transformer)

    @classmethod
    def check(cls, folder: Path) -> None:
        """Attention between all tokens.

        Raises:
            ConfigError: sparse attention.
        """
        (name,) = transformer_names(folder)
        kind = read_config(folder / name, networks_of(folder)[name])["attention_type"]
        if kind != "regular":
            raise ConfigError(
                f"{folder} has attention_type {kind!r}: which blocks of tokens it attends to is chosen again in every "
                "forward, and it is not trained here; take weights with attention_type 'regular'"
            )

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Qwen2.5-VL's states of the text in the pipeline's template, their mask, and CLIP's pooled ones.

        One by one, since the pipeline masks no padding, and then padded to `max_sequence_length` with zeros.
        """
        rows = [self.pipeline.encode_prompt(text, max_sequence_length=self.max_sequence_length) for text in texts]
        lengths = torch.tensor([states.shape[1] for states, _, _ in rows])
        padded = [F.pad(states, (0, 0, 0, self.max_sequence_length - states.shape[1])) for states, _, _ in rows]
        mask = torch.arange(self.max_sequence_length) < lengths[:, None]
        return {
            "prompt_embeds": torch.cat(padded),
            "prompt_attention_mask": mask.to(padded[0].device),
            "pooled_prompt_embeds": torch.cat([pooled for _, pooled, _ in rows]),
        }

    def latent_shape(self, video: VideoConfig) -> tuple[int, int, int, int]:
        patch_frames, patch, _ = self.transformer_config["patch_size"]  # as high as wide
        shape = self.compressed(video, patch)
        if max(shape[1] // patch_frames, shape[2] // patch, shape[3] // patch) > POSITIONS:
            raise ConfigError(
                f"a video of {video.num_frames} x {video.height} x {video.width} has latents of {shape[1:]} in patches "
                f"of {patch_frames, patch, patch}; the transformer knows {POSITIONS} positions along each axis"
            )
        return shape

    def example(self) -> tuple[Latents, Conditioning]:
        config, generator = self.transformer_config, torch.Generator().manual_seed(0)
        frames, side = 2 * config["patch_size"][0], 2 * config["patch_size"][1]
        latents = torch.randn(1, config["in_visual_dim"], frames, side, side, generator=generator)
        return latents, {
            "prompt_embeds": torch.randn(1, 4, config["in_text_dim"], generator=generator),
            "prompt_attention_mask": torch.tensor([[True, True, True, False]]),
            "pooled_prompt_embeds": torch.randn(1, config["in_text_dim2"], generator=generator),
        }

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        """The scheduler's own levels for so many steps: evenly from its largest to its smallest, and shifted."""
        scheduler = self.pipeline.scheduler
        levels = np.linspace(scheduler.sigma_max, scheduler.sigma_min, num_steps)
        return scheduled_sigmas(scheduler, levels.tolist(), shift)

    def velocity(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Velocity:
        texts, device = conditioning["prompt_embeds"], latents.device
        inputs = self.transformer_input(self.whole(latents, conditioning)).to(texts.dtype)
        frames, height, width = inputs.shape[1:4]
        patch_frames, patch, _ = self.transformer_config["patch_size"]
        spatial = self.vae_config["spatial_compression_ratio"]
        prediction = self.transformers(
            self.transformer_at(float(sigma.max())),
            hidden_states=inputs,
            timestep=self.timesteps(len(latents), sigma).to(device, texts.dtype),
            encoder_hidden_states=texts,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            visual_rope_pos=[
                torch.arange(size, device=device) for size in (frames // patch_frames, height // patch, width // patch)
            ],
            text_rope_pos=text_positions(conditioning["prompt_attention_mask"]),
            scale_factor=self.pipeline._get_scale_factor(height * spatial, width * spatial),
            return_dict=False,
        )
        return prediction.movedim(-1, 1)[:, :, self.given_frames :].float()

    def timesteps(self, samples: int, sigma: Tensor) -> Float[Tensor, "samples"]:
        """The noise level in the transformer's units, fp32."""
        return (sigma * self.pipeline.scheduler.config.num_train_timesteps).expand(samples)

    def whole(self, latents: Latents, conditioning: Conditioning) -> Whole:
        """All frames that the transformer sees: here those that are sampled."""
        return latents

    def transformer_input(self, whole: Whole) -> ChannelsLast:
        """The frames, and where the folder has channels for them as many zeros, and which frames are given."""
        if not self.transformer_config["visual_cond"]:
            return whole.movedim(1, -1)
        given = torch.zeros_like(whole[:, :1])
        given[:, :, : self.given_frames] = 1
        return torch.cat([whole, torch.zeros_like(whole), given], dim=1).movedim(1, -1)

    def call_arguments(
        self,
        pipeline: Any,
        latents: Latents,
        video: VideoConfig,
        images: Float[Tensor, "samples 3 height width"] | None,
    ) -> dict[str, Any]:
        """Noise that it is given the pipeline hands to the transformer as it is."""
        return {"latents": self.transformer_input(latents)}


def text_positions(mask: Tensor) -> Tensor:
    """Of each text's tokens, from 0: [samples, text]; `PADDING` where the mask [samples, text] is false."""
    return torch.where(mask, torch.arange(mask.shape[1], device=mask.device), PADDING)
