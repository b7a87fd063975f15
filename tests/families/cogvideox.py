"""CogVideoX: 2B with additive positions, 5B image-to-video with learned and rotary ones, 1.5 with paired latents."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.made.random_wan import TEXT_TOKENS, word_tokenizer

VIDEO = VideoConfig(num_frames=9, height=64, width=64, fps=8.0)
CHANNELS = 4
IMAGE = {"in_channels": 2 * CHANNELS}
PAIRS: dict[str, Any] = {"patch_size_t": 2, "use_rotary_positional_embeddings": True, "patch_bias": False}
LEARNED: dict[str, Any] = {"use_learned_positional_embeddings": True, "use_rotary_positional_embeddings": True}


def ddim(shipped: Any) -> CogVideoXDDIMScheduler:
    """DDIM, which takes Euler steps of the ODE in CogVideoX' coordinates."""
    return CogVideoXDDIMScheduler.from_config(shipped.config)


def random_cogvideox(folder: Path, own: dict[str, Any] | None = None, invert_scale: bool = False) -> Path:
    """A pipeline of random weights; image-to-video where the transformer has channels for images.

    Args:
        own: overrides of the transformer's config.
        invert_scale: divide the image's latents by the scale instead of multiplying (CogVideoX 1.5).
    """
    config = {"in_channels": CHANNELS, **(own or {})}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = word_tokenizer()
        t5 = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        parts = (tokenizer, T5EncoderModel(t5), random_vae(invert_scale), random_transformer(config))
    shipped = CogVideoXDPMScheduler if "in_channels" in (own or {}) else CogVideoXDDIMScheduler
    scheduler = shipped(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False,
        snr_shift_scale=1.0,
    )  # fmt: skip
    pipeline = CogVideoXPipeline if config["in_channels"] == CHANNELS else CogVideoXImageToVideoPipeline
    pipeline(*parts, scheduler).save_pretrained(folder)
    return folder


def random_vae(invert_scale: bool) -> AutoencoderKLCogVideoX:
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=2,
        scaling_factor=0.7, invert_scale_latents=invert_scale, sample_height=64, sample_width=64,
    )  # fmt: skip
    torch.nn.init.normal_(vae.decoder.conv_out.conv.weight, std=0.01)  # rounding differences in latents stay small
    head = vae.encoder.conv_out.conv  # mean, then log-variance: so low that diffusers' sample equals the mean
    torch.nn.init.zeros_(head.weight[CHANNELS:])
    torch.nn.init.constant_(head.bias[CHANNELS:], -30.0)
    return vae


def random_transformer(config: dict[str, Any]) -> CogVideoXTransformer3DModel:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, out_channels=CHANNELS, time_embed_dim=16, text_embed_dim=16,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=TEXT_TOKENS,
        **config,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    if config.get("use_learned_positional_embeddings"):
        torch.nn.init.normal_(transformer.patch_embed.pos_embedding)
    return transformer


COGVIDEOX = Case(random_cogvideox, VIDEO, TEXT_TOKENS, euler=ddim)
COGVIDEOX_IMAGE = Case(partial(random_cogvideox, own={**IMAGE, **LEARNED}), VIDEO, TEXT_TOKENS, euler=ddim)
COGVIDEOX_PAIRS = Case(partial(random_cogvideox, own=PAIRS), VIDEO, TEXT_TOKENS, euler=ddim)
COGVIDEOX_PAIRS_ONE_FRAME = replace(COGVIDEOX_PAIRS, video=replace(VIDEO, num_frames=1))
COGVIDEOX_PAIRS_IMAGE = Case(
    partial(random_cogvideox, own={**IMAGE, **PAIRS, "ofs_embed_dim": 16}, invert_scale=True),
    VIDEO, TEXT_TOKENS, euler=ddim,
)  # fmt: skip
