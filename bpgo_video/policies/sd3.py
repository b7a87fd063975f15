"""Stable Diffusion 3 and 3.5 text-to-image (arXiv 2403.03206): two CLIPs and T5, whose states follow CLIP's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.distributed.ulysses import Ulysses
from bpgo_video.policies.attention import (
    Processor,
    SequencePlan,
    of_text,
    of_video,
    projected,
    replace_processors,
)
from bpgo_video.policies.base import Arguments, LatentShape, Shapes
from bpgo_video.policies.image import FlatVAE, ImagePolicy
from bpgo_video.policies.networks import parts_of
from bpgo_video.policies.schedule import log_shift, scheduled_sigmas
from bpgo_video.types import Conditioning, Latents, Velocity

Pictures = Float[Tensor, "samples channels height width"]
CLIP_TOKENS = 77
MAX_SHIFT = 1.16  # the pipeline's default; those of other families have 1.15


class SD3Attention(Processor):
    """Attention of the image's tokens, which come first, and of text tokens; without text in 3.5's second attention.

    diffusers' own processor calls PyTorch's attention directly, so sequence groups and other backends would not work.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "samples tokens dim"],
        encoder_hidden_states: Float[Tensor, "samples text dim"] | None = None,
        attention_mask: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The attention's output for image tokens, and for text tokens if there are any."""
        heads, tokens = of_video(attn, hidden_states), hidden_states.shape[1]
        if encoder_hidden_states is None:
            return projected(attn, self.attend(*heads), hidden_states[:, :0])[0]
        text = of_text(attn, encoder_hidden_states)
        output = self.attend(*(torch.cat(pair, dim=1) for pair in zip(heads, text, strict=True)))
        return projected(attn, output[:, :tokens], output[:, tokens:])


def use_dispatcher(transformer: nn.Module) -> None:
    """Attention through diffusers' dispatcher."""
    for attention in ("attn", "attn2"):
        replace_processors(transformer, attention=attention, processor=SD3Attention)


def positions_are_in_tokens(transformer: nn.Module, ulysses: Ulysses) -> None:
    """Nothing else to split: positions are added to the tokens before the first block."""


class SD3Policy(FlatVAE, ImagePolicy):
    """Stable Diffusion 3 and 3.5."""

    pipeline_name = "StableDiffusion3Pipeline"
    block_names = ("JointTransformerBlock",)
    length_tokenizer = "tokenizer_3"  # T5's; the other two are CLIP's
    one_dtype = True
    sequence_plan = SequencePlan(
        blocks=("transformer_blocks",), rope=positions_are_in_tokens, head="proj_out", attention=use_dispatcher
    )

    @classmethod
    def check(cls, folder: Path) -> None:
        if "text_encoder_3" not in parts_of(folder):
            raise ConfigError(
                f"{folder} has no text_encoder_3, without which diffusers does not load it; name a whole folder "
                "(T5 runs only while prompts are built)"
            )
        super().check(folder)

    def prepare(self, transformer: nn.Module) -> None:
        use_dispatcher(transformer)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The CLIPs' states padded to T5's width, then T5's, padding included; and the CLIPs' pooled states."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), None, None, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def text_shapes(self, text_tokens: int) -> Shapes:
        config = self.transformer_config
        return {
            "prompt_embeds": (CLIP_TOKENS + text_tokens, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        shape, config = super().latent_shape(video), self.transformer_config
        limit = config["pos_embed_max_size"] * config["patch_size"] * self.strides[1]
        if max(video.height, video.width) > limit:
            raise ConfigError(
                f"video is {video.height} x {video.width}; this transformer has positions for {limit} pixels a side"
            )
        return shape

    def sigmas(self, num_steps: int, video: VideoConfig, shift: float | None = None) -> Tensor:
        """Evenly spaced from the scheduler's largest level to its smallest, then shifted."""
        scheduler, (_, rows, columns) = self.pipeline.scheduler, self.patch
        _, _, height, width = self.latent_shape(video)
        levels = np.linspace(scheduler.sigma_max, scheduler.sigma_min, num_steps)
        mu = log_shift(scheduler, height // rows * (width // columns), max_shift=MAX_SHIFT)
        return scheduled_sigmas(scheduler, levels.tolist(), shift, mu)

    def hidden_states(self, latents: Latents, conditioning: Conditioning) -> Pictures:
        return latents[:, :, 0]

    def sampled_frames(self, prediction: Pictures, latents: Latents) -> Velocity:
        return prediction[:, :, None]

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        return {"pooled_projections": conditioning["pooled_prompt_embeds"]}
