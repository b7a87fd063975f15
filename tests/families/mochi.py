"""Mochi: reversed time, a mask of text tokens, and a custom schedule."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from transformers import T5Config, T5EncoderModel

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.made.random_wan import TEXT_TOKENS, word_tokenizer

CHANNELS = 12  # diffusers' pipeline knows no other


def random_mochi(folder: Path) -> Path:
    """A pipeline of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = word_tokenizer()
        t5 = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        transformer = MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=CHANNELS,
            text_embed_dim=16, time_embed_dim=16, max_sequence_length=TEXT_TOKENS,
        )  # fmt: skip
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
        torch.nn.init.normal_(transformer.pos_frequencies, std=0.1)
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1), add_attention_block=(False,) * 5, scaling_factor=1.5,
        )  # fmt: skip
        torch.nn.init.normal_(vae.decoder.proj_out.weight, std=0.05)
        MochiPipeline(
            FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae, T5EncoderModel(t5), tokenizer, transformer
        ).save_pretrained(folder)
    return folder


MOCHI = Case(random_mochi, VideoConfig(num_frames=13, height=32, width=32, fps=30.0), TEXT_TOKENS)
