"""Stable Diffusion 3, and 3.5 medium with norms of queries and keys and second attentions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.families.case import Case
from tests.families.flux import IMAGE, random_vae
from tests.made.random_wan import TEXT_TOKENS, word_tokenizer

MEDIUM: dict[str, Any] = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
WIDTHS = (8, 12)  # of CLIP-L and CLIP-G: together less than T5's


def random_sd3(folder: Path, **own: Any) -> Path:
    """A pipeline of random weights; `own` are settings of its transformer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clips, tokenizer = {}, word_tokenizer(after=1, limit=77)
        for name, width in zip(("", "_2"), WIDTHS, strict=True):
            config = CLIPTextConfig(
                vocab_size=len(tokenizer), num_hidden_layers=2, eos_token_id=1, hidden_size=width, intermediate_size=16,
                num_attention_heads=2, projection_dim=width,
            )  # fmt: skip
            clips |= {f"text_encoder{name}": CLIPTextModelWithProjection(config), f"tokenizer{name}": tokenizer}
        words = word_tokenizer()
        encoder = T5Config(vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        transformer = SD3Transformer2DModel(
            sample_size=8, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=sum(WIDTHS), out_channels=4,
            pos_embed_max_size=32, **own,
        )  # fmt: skip
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
        StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=random_vae(),
            text_encoder_3=T5EncoderModel(encoder), tokenizer_3=words, **clips,
        ).save_pretrained(folder)  # fmt: skip
    return folder


LORA = ("to_q", "to_k", "add_q_proj", "to_out.0")
SD35 = Case(partial(random_sd3, **MEDIUM), IMAGE, TEXT_TOKENS, lora=LORA)
SD3 = Case(random_sd3, IMAGE, TEXT_TOKENS)
