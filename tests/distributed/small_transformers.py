"""Transformers of random weights, one per way of attending, with inputs; small enough for hundreds of updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from jaxtyping import Float
from torch import Tensor, nn

SAMPLES = 4
HEADS = 4
Latents = Float[Tensor, "samples channels frames height width"]
LATENTS = {"even": (4, 3, 4, 4), "odd": (4, 3, 2, 6)}  # 12 and 9 tokens


@dataclass(frozen=True)
class Family:
    """A transformer class, what it is called with beside latents and timestep, and where its latents have frames."""

    build: Callable[[], nn.Module]
    block_classes: tuple[type[nn.Module], ...]
    beside: Callable[[Latents, torch.Generator], dict[str, Any]]
    frames_dim: int = 2


def wan() -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=24, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def wan_text(latents: Latents, generator: torch.Generator) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(SAMPLES, 5, 8, generator=generator)}


def hunyuan() -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=8, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=1.0, patch_size=2, patch_size_t=1, guidance_embeds=False,
        text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 2, 2),
    )  # fmt: skip


def hunyuan_text(latents: Latents, generator: torch.Generator) -> dict[str, Tensor]:
    mask = torch.ones(SAMPLES, 5, dtype=torch.long)
    mask[1, 3:] = 0  # a shorter prompt: its padding is masked
    return {
        "encoder_hidden_states": torch.randn(SAMPLES, 5, 8, generator=generator),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(SAMPLES, 8, generator=generator),
    }


def cogvideox() -> nn.Module:
    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=2, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def cogvideox_text(latents: Latents, generator: torch.Generator) -> dict[str, Any]:
    """Text, and the rotary embeddings of all samples' tokens."""
    frames, height, width = latents.shape[2:]
    grid = (height // 2, width // 2)
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), grid), grid, temporal_size=frames)
    return {**wan_text(latents, generator), "image_rotary_emb": rotary}


FAMILIES = {
    "wan": Family(wan, (WanTransformerBlock,), wan_text),
    "hunyuan": Family(hunyuan, (HunyuanVideoTransformerBlock, HunyuanVideoSingleTransformerBlock), hunyuan_text),
    "cogvideox": Family(cogvideox, (CogVideoXBlock,), cogvideox_text, frames_dim=1),
}


def random_transformer(family: str) -> nn.Module:
    """Every weight away from zero, so that every gradient is too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = FAMILIES[family].build()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return module


def inputs(family: str, tokens: str) -> tuple[dict[str, Any], Tensor]:
    """Keyword arguments of a forward over SAMPLES samples, tensors one row a sample; and a target for its output."""
    generator = torch.Generator().manual_seed(1)
    latents, target = (torch.randn(SAMPLES, *LATENTS[tokens], generator=generator) for _ in range(2))
    timestep = torch.tensor([900.0, 700.0, 400.0, 50.0])
    own, beside = FAMILIES[family], FAMILIES[family].beside(latents, generator)
    latents, target = (x.movedim(2, own.frames_dim) for x in (latents, target))
    return {"hidden_states": latents, "timestep": timestep, **beside}, target


def sample_losses(module: Any, arguments: dict[str, Any], target: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and a loss per sample that weighs every element differently."""
    output = module(**arguments, return_dict=False)[0]
    return output, ((output - target) ** 2).flatten(1).mean(dim=1)
