"""Small random transformers, one per kind of attention, with inputs; fast enough for hundreds of updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTokenReplaceSingleTransformerBlock,
    HunyuanVideoTokenReplaceTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from jaxtyping import Float
from torch import Tensor, nn

from bpgo_video.policies.attention import SequencePlan
from bpgo_video.policies.cogvideox import CogVideoXPolicy
from bpgo_video.policies.hunyuan import HunyuanVideoPolicy
from bpgo_video.policies.ltx import LTXPolicy
from bpgo_video.policies.wan import WanPolicy

SAMPLES = 4
HEADS = 4
Latents = Float[Tensor, "samples channels frames height width"]
LATENTS = {"even": (4, 3, 4, 4), "odd": (4, 3, 2, 6)}  # 12 and 9 tokens


@dataclass(frozen=True)
class Family:
    """A transformer class and its calling convention.

    Attributes:
        text: inputs besides latents and timestep.
        layout: maps latents, timestep and target to call arguments and a target.
        plan: the context-parallel plan, i.e. where tokens are split.
    """

    build: Callable[[], nn.Module]
    block_classes: tuple[type[nn.Module], ...]
    text: Callable[[torch.Generator], dict[str, Tensor]]
    layout: Callable[[Latents, Tensor, Latents], tuple[dict[str, Any], Tensor]]
    plan: SequencePlan | None


def wan() -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=24, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def wan_text(generator: torch.Generator) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(SAMPLES, 5, 8, generator=generator)}


def hunyuan(image_condition_type: str | None = None) -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=8, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=1.0, patch_size=2, patch_size_t=1, guidance_embeds=False,
        text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 2, 2),
        image_condition_type=image_condition_type,
    )  # fmt: skip


def hunyuan_text(generator: torch.Generator) -> dict[str, Tensor]:
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


def ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=8, cross_attention_dim=32,
        num_layers=2, caption_channels=8,
    )  # fmt: skip


def ltx_text(generator: torch.Generator) -> dict[str, Tensor]:
    found = hunyuan_text(generator)
    return {name: found[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}


def as_video(latents: Latents, timestep: Tensor, target: Latents) -> tuple[dict[str, Any], Tensor]:
    """Unchanged arguments."""
    return {"hidden_states": latents, "timestep": timestep}, target


def frames_first(latents: Latents, timestep: Tensor, target: Latents) -> tuple[dict[str, Any], Tensor]:
    """Frames before channels, with rotary embeddings for the tokens of every sample."""
    frames, height, width = latents.shape[2:]
    grid = (height // 2, width // 2)
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), grid), grid, temporal_size=frames)
    arguments = {"hidden_states": latents.transpose(1, 2), "timestep": timestep, "image_rotary_emb": rotary}
    return arguments, target.transpose(1, 2)


def as_tokens(latents: Latents, timestep: Tensor, target: Latents) -> tuple[dict[str, Any], Tensor]:
    """Tokens with a timestep and coordinates each; tokens of the first frame have no noise."""
    frames, height, width = latents.shape[2:]
    noisy = torch.ones(frames, height * width)
    noisy[0] = 0
    grid = torch.cartesian_prod(*(torch.arange(float(size)) for size in (frames, height, width)))
    arguments = {
        "hidden_states": latents.flatten(2).mT,
        "timestep": timestep[:, None] * noisy.flatten(),
        "video_coords": grid.mT.expand(SAMPLES, -1, -1),
    }
    return arguments, target.flatten(2).mT


FAMILIES = {
    "wan": Family(wan, (WanTransformerBlock,), wan_text, as_video, WanPolicy.sequence_plan),
    "hunyuan": Family(
        hunyuan,
        (HunyuanVideoTransformerBlock, HunyuanVideoSingleTransformerBlock),
        hunyuan_text,
        as_video,
        HunyuanVideoPolicy.sequence_plan,
    ),
    "hunyuan_first_frame": Family(
        partial(hunyuan, "token_replace"),
        (HunyuanVideoTokenReplaceTransformerBlock, HunyuanVideoTokenReplaceSingleTransformerBlock),
        hunyuan_text,
        as_video,
        HunyuanVideoPolicy.sequence_plan,
    ),
    "ltx": Family(ltx, (LTXVideoTransformerBlock,), ltx_text, as_tokens, LTXPolicy.sequence_plan),
    "cogvideox": Family(cogvideox, (CogVideoXBlock,), wan_text, frames_first, CogVideoXPolicy.sequence_plan),
}


def random_transformer(family: str) -> nn.Module:
    """A transformer whose weights are all far from zero, and so are its gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = FAMILIES[family].build()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return module


def inputs(family: str, tokens: str) -> tuple[dict[str, Any], Tensor]:
    """Keyword arguments of a forward over SAMPLES samples, one row per sample, and a target for its output."""
    generator = torch.Generator().manual_seed(1)
    latents, target = (torch.randn(SAMPLES, *LATENTS[tokens], generator=generator) for _ in range(2))
    timestep = torch.tensor([900.0, 700.0, 400.0, 50.0])
    arguments, target = FAMILIES[family].layout(latents, timestep, target)
    return {**arguments, **FAMILIES[family].text(generator)}, target


def sample_losses(module: Any, arguments: dict[str, Any], target: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and a loss per sample with a different weight for every element."""
    output = module(**arguments, return_dict=False)[0]
    return output, ((output - target) ** 2).flatten(1).mean(dim=1)
