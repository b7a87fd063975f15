"""FLUX.1: [dev] with embedded guidance and a shift by size, and [schnell] with neither."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.made.random_wan import TEXT_TOKENS, word_tokenizer

IMAGE = VideoConfig(num_frames=1, height=32, width=48, fps=1.0)
DEV = {
    "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 4,
    "max_image_seq_len": 64,
}  # fmt: skip


def random_vae() -> AutoencoderKL:
    """A VAE of images in the layout of FLUX and SD3, which have no 1x1 convolutions around the latents."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4, sample_size=32, scaling_factor=0.36,
        shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    vae.decoder.conv_out.weight.data *= 0.3  # rounding differences in latents stay small
    return vae


def random_flux(folder: Path, distilled: bool) -> Path:
    """A pipeline of random weights.

    Args:
        distilled: with a guidance input and a shift by size, as [dev]; else as [schnell].
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip_tokenizer, t5_tokenizer = word_tokenizer(after=1, limit=77), word_tokenizer()
        clip = CLIPTextConfig(
            vocab_size=len(clip_tokenizer), num_hidden_layers=1, eos_token_id=1, hidden_size=16, intermediate_size=24,
            num_attention_heads=2,
        )  # fmt: skip
        t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=distilled, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**DEV if distilled else {"shift": 1.0}), vae=random_vae(),
            text_encoder=CLIPTextModel(clip), tokenizer=clip_tokenizer, text_encoder_2=T5EncoderModel(t5),
            tokenizer_2=t5_tokenizer, transformer=transformer,
        ).save_pretrained(folder)  # fmt: skip
    return folder


FLUX = Case(
    partial(random_flux, distilled=True), IMAGE, TEXT_TOKENS, lora=("to_q", "to_k", "add_q_proj", "to_out.0"),
    options={"embedded_guidance": 2.0},
)  # fmt: skip
FLUX_SCHNELL = Case(partial(random_flux, distilled=False), IMAGE, TEXT_TOKENS)
