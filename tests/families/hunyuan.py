"""HunyuanVideo: text-to-video, told its guidance."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.made.random_wan import word_tokenizer

VIDEO = VideoConfig(num_frames=9, height=32, width=48, fps=8.0)
TEXT_TOKENS = 12
LLAMA = {name: DEFAULT_PROMPT_TEMPLATE[name] for name in ("template", "crop_start")}


def template_tokenizer(template: str, crop_start: int) -> PreTrainedTokenizerFast:
    """Of words; what stands before a prompt in the pipeline's template is as long as the pipeline takes it to be."""
    before = template.partition("{}")[0]
    tokenizer = word_tokenizer(before=crop_start - len(re.findall(r"\w+", before)), limit=256)
    words_alone = pre_tokenizers.Split(Regex(r"\w+"), "removed", invert=True)
    tokenizer.backend_tokenizer.pre_tokenizer = words_alone
    return tokenizer


def random_hunyuan(folder: Path) -> None:
    """Write the pipeline."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, mlp_ratio=1.0, text_embed_dim=16, pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
        )  # fmt: skip
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
        tokenizer, tokenizer_2 = template_tokenizer(**LLAMA), word_tokenizer(after=1, limit=77)
        words, width = len(tokenizer), {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        llama = LlamaModel(LlamaConfig(vocab_size=words, num_hidden_layers=4, num_key_value_heads=2, **width))
        clip = CLIPTextModel(CLIPTextConfig(vocab_size=words, num_hidden_layers=1, eos_token_id=1, **width))
    parts = (llama, tokenizer, transformer, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), clip, tokenizer_2)
    HunyuanVideoPipeline(*parts).save_pretrained(folder)


HUNYUAN = Case(
    random_hunyuan, VIDEO, TEXT_TOKENS, lora=("to_q", "to_k", "add_q_proj", "to_out.0"),
    options={"embedded_guidance": 4.0},
)  # fmt: skip
