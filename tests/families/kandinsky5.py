"""Kandinsky 5: text-to-video, and image-to-video whose transformer receives a mask of the given frames."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Attention, Kandinsky5Modulation
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.families.hunyuan import template_tokenizer
from tests.made.random_qwen import ROPE, TOWER
from tests.made.random_wan import word_tokenizer

VIDEO = VideoConfig(num_frames=9, height=48, width=48, fps=24.0)
TEXT_TOKENS = 12
CHANNELS = 4
SHORT = 0.03
ENDS = {"bos_token_id": 0, "eos_token_id": 1}


def random_kandinsky5(folder: Path, images: bool = False, visual_cond: bool = False) -> None:
    """Write the pipeline with Qwen's tokenizer instead of its processor, which needs torchvision.

    Args:
        images: image-to-video; the VAE's variance is minimal because the pipeline samples from it.
        visual_cond: whether the transformer has channels for given frames.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = random_transformer(visual_cond=visual_cond)
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
        torch.nn.init.zeros_(vae.quant_conv.weight[CHANNELS:])
        torch.nn.init.constant_(vae.quant_conv.bias[CHANNELS:], -30.0)
        pipeline_class: Any = Kandinsky5I2VPipeline if images else Kandinsky5T2VPipeline
        pipeline = pipeline_class(transformer, vae, None, None, None, None, FlowMatchEulerDiscreteScheduler(shift=5.0))
        before = pipeline.prompt_template, pipeline.prompt_template_encode_start_idx
        words, clip_words = template_tokenizer(*before), word_tokenizer(after=1, limit=77)
        width = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": len(words), **ENDS}
        qwen = Qwen2_5_VLConfig(
            text_config={**width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                         "rope_parameters": ROPE},
            vision_config={**TOWER, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32},
        )  # fmt: skip
        clip = CLIPTextConfig(**width, num_hidden_layers=1, num_attention_heads=2)
        pipeline.register_modules(
            text_encoder=Qwen2_5_VLForConditionalGeneration(qwen), text_encoder_2=CLIPTextModel(clip),
            tokenizer=words, tokenizer_2=clip_words,
        )  # fmt: skip
    pipeline.save_pretrained(folder)


def random_transformer(**own: Any) -> Kandinsky5Transformer3DModel:
    """A random transformer whose gates, initially 0, are open in every block.

    Queries and keys are scaled by `SHORT`: diffusers rounds them to bf16, and the rounding differences in them and in
    their gradients must stay below 1e-5. This hides positions, which `test_kandinsky5.py` compares separately.
    """
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=CHANNELS, out_visual_dim=CHANNELS, in_text_dim=32, in_text_dim2=32, time_dim=16, model_dim=32,
        ff_dim=48, num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 6, 6), **own,
    )  # fmt: skip
    for module in transformer.modules():
        if isinstance(module, Kandinsky5Modulation):
            torch.nn.init.normal_(module.out_layer.weight, std=0.3)
            torch.nn.init.normal_(module.out_layer.bias, std=0.3)
        elif isinstance(module, Kandinsky5Attention):
            torch.nn.init.constant_(module.query_norm.weight, SHORT)
            torch.nn.init.constant_(module.key_norm.weight, SHORT)
    return transformer


KANDINSKY5 = Case(
    random_kandinsky5, VIDEO, TEXT_TOKENS,
    lora=("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"),
)  # fmt: skip
KANDINSKY5_IMAGE = replace(
    KANDINSKY5, write=partial(random_kandinsky5, images=True, visual_cond=True), video=replace(VIDEO, num_frames=17),
    adjusted_frames=4,
)  # fmt: skip
