"""Qwen-Image: masked texts of Qwen2.5-VL, guidance with the norm of the prompt's velocity, and a video VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.families.case import Case
from tests.families.flux import DEV, IMAGE
from tests.families.hunyuan import template_tokenizer
from tests.families.kandinsky5 import ENDS
from tests.made.random_qwen import ROPE, TOWER

TEXT_TOKENS = 12
STATISTICS: dict[str, Any] = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.8, 1.2, 1.0, 1.5]}


def random_qwen_image(folder: Path, **own: Any) -> Path:
    """A pipeline of random weights; `own` are settings of its transformer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **own,
        )  # fmt: skip
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
        vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **STATISTICS)
        vae.decoder.conv_out.weight.data *= 0.3  # rounding differences in latents stay small
        pipeline = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(**DEV), vae, None, None, transformer)
        words = template_tokenizer(pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx)
        qwen = Qwen2_5_VLConfig(
            text_config={
                "hidden_size": 32, "intermediate_size": 48, "vocab_size": len(words), "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": ROPE, **ENDS,
            },
            vision_config={**TOWER, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32},
        )  # fmt: skip
        pipeline.register_modules(text_encoder=Qwen2_5_VLForConditionalGeneration(qwen), tokenizer=words)
    pipeline.save_pretrained(folder)
    return folder


QWEN_IMAGE = Case(random_qwen_image, IMAGE, TEXT_TOKENS, lora=("to_q", "to_k", "add_q_proj", "to_out.0"))
