"""LTX-Video: text-to-video with the 0.9.1 VAE, which decodes noisy latents, and image-to-video with the plain VAE."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.made.random_wan import TEXT_TOKENS, word_tokenizer

VIDEO = VideoConfig(num_frames=17, height=64, width=96, fps=24.0)  # the pipeline's default is 25


def random_ltx(folder: Path, images: bool = False, noisy_vae: bool = False) -> None:
    """Write the pipeline.

    Args:
        images: image-to-video; the VAE's variance is minimal because the pipeline samples from it.
        noisy_vae: condition the VAE on the remaining noise of its latents.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=2, caption_channels=16,
        )  # fmt: skip
        blocks = (8, 8, 8, 8)
        vae = AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=blocks, decoder_block_out_channels=blocks,
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), timestep_conditioning=noisy_vae,
        )  # fmt: skip
        torch.nn.init.normal_(vae.latents_mean)
        torch.nn.init.uniform_(vae.latents_std, 0.5, 1.5)
        vae.encoder.conv_out.conv.bias.data[8:] = -30.0  # the logarithm of the variance
        tokenizer = word_tokenizer()
        encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.1, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        max_image_seq_len=4096,
    )  # fmt: skip
    pipeline_class = LTXImageToVideoPipeline if images else LTXPipeline
    pipeline_class(scheduler, vae, encoder, tokenizer, transformer).save_pretrained(folder)


LTX = Case(
    partial(random_ltx, noisy_vae=True), VIDEO, TEXT_TOKENS,
    options={"decode_timestep": 0.05, "decode_noise_scale": 0.025},
)  # fmt: skip
LTX_IMAGE = Case(partial(random_ltx, images=True), VIDEO, TEXT_TOKENS)
