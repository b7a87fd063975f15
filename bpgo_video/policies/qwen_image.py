"""Qwen-Image text-to-image (arXiv 2508.02324): states of Qwen2.5-VL, masked, and a video VAE for one frame.

Its classifier-free guidance gives the combined velocity, token by token, the norm of the prompt's own velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn
from torch.nn.functional import pad

from bpgo_video.distributed.ulysses import Ulysses
from bpgo_video.policies.attention import (
    Processor,
    SequencePlan,
    of_text,
    of_video,
    projected,
    replace_processors,
)
from bpgo_video.policies.base import Arguments, Shapes
from bpgo_video.policies.image import PackedImagePolicy, packed, unpacked
from bpgo_video.types import Conditioning, Latents, Velocity

Angles = tuple[Complex[Tensor, "tokens half"], Complex[Tensor, "text half"]]  # of image tokens, and of text tokens


class QwenAttention(Processor):
    """Joint attention of text tokens, which come first, and of the image's tokens, with a mask of keys.

    diffusers' own processor makes the mask for the tokens that it is given, in sequence groups a part of the image's.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "samples tokens dim"],
        encoder_hidden_states: Float[Tensor, "samples text dim"],
        encoder_hidden_states_mask: Bool[Tensor, "samples text"],
        image_rotary_emb: Angles,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        """The attention's output for image and text tokens."""
        angles, text_angles = image_rotary_emb
        video, texts = of_video(attn, hidden_states), of_text(attn, encoder_hidden_states)
        pairs = zip(_turned(texts, text_angles), _turned(video, angles), strict=True)
        mask = pad(encoder_hidden_states_mask, (0, self.all_tokens(hidden_states.shape[1])), value=True)
        output = self.attend(*(torch.cat(pair, dim=1) for pair in pairs), mask=mask[:, None, None])
        text = encoder_hidden_states.shape[1]
        return projected(attn, output[:, text:], output[:, :text])


def _turned(heads: list[Tensor], angles: Complex[Tensor, "tokens half"]) -> list[Any]:
    """Queries and keys [samples, tokens, heads, head_dim] turned by the angles of their token; and values."""
    return [*(apply_rotary_emb_qwen(x, cast(Any, angles), use_real=False) for x in heads[:2]), heads[2]]


def mask_all_keys(transformer: nn.Module) -> None:
    """Attention with a mask of the keys of all ranks."""
    replace_processors(transformer, attention="attn", processor=QwenAttention)


def split_positions(transformer: nn.Module, ulysses: Ulysses) -> None:
    """Split the angles of the image's tokens; every rank has all text tokens."""

    def split(_: nn.Module, __: tuple[Any, ...], output: Angles) -> Angles:
        return ulysses.split(output[0], 0), output[1]

    transformer.get_submodule("pos_embed").register_forward_hook(split)


class QwenImagePolicy(PackedImagePolicy):
    """Qwen-Image."""

    pipeline_name = "QwenImagePipeline"
    block_names = ("QwenImageTransformerBlock",)
    guidance_argument = "true_cfg_scale"
    required_settings = MappingProxyType(
        {
            "transformer": {  # others are of models that edit images or make layers
                "guidance_embeds": (False,),
                "zero_cond_t": (False,),
                "use_additional_t_cond": (False,),
                "use_layer3d_rope": (False,),
            }
        }
    )
    sequence_plan = SequencePlan(
        blocks=("transformer_blocks",), rope=split_positions, head="proj_out", text_first=True, attention=mask_all_keys
    )

    def prepare(self, transformer: Any) -> None:
        """Make its table of angles again, which is neither parameter nor buffer: a plan makes it without values."""
        rope = transformer.pos_embed
        transformer.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Qwen's states of the text in the pipeline's template, and the mask of real tokens."""
        embeddings, mask = self.pipeline.encode_prompt(list(texts), max_sequence_length=self.max_sequence_length)
        if mask is None:  # no padding
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        missing = self.max_sequence_length - embeddings.shape[1]
        return {
            "prompt_embeds": pad(embeddings, (0, 0, 0, missing)),
            "prompt_embeds_mask": pad(mask.bool(), (0, missing)),
        }

    def text_shapes(self, text_tokens: int) -> Shapes:
        texts = (text_tokens, self.transformer_config["joint_attention_dim"])
        return {"prompt_embeds": texts, "prompt_embeds_mask": (text_tokens,)}

    @property
    def strides(self) -> tuple[int, int]:
        halvings = self.vae_config["temperal_downsample"]
        return 2 ** sum(halvings), 2 ** len(halvings)

    def rescaled(self, guided: Velocity, prompted: Velocity) -> Velocity:
        """Each token with the norm that it has for the prompt alone."""
        tokens = packed(guided)
        ratio = packed(prompted).norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
        return unpacked(tokens * ratio, rows=self.grid(guided)[1])

    def transformer_arguments(self, latents: Latents, sigma: Tensor, conditioning: Conditioning) -> Arguments:
        return {
            **super().transformer_arguments(latents, sigma, conditioning),
            "encoder_hidden_states_mask": conditioning["prompt_embeds_mask"],
            "img_shapes": [[self.grid(latents)]] * len(latents),
        }
