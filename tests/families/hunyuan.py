"""HunyuanVideo: text-to-video with embedded guidance, and image-to-video, whose text encoder also reads the image."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as image_to_video
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Regex, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.made.random_wan import word_tokenizer

VIDEO = VideoConfig(num_frames=9, height=32, width=48, fps=8.0)
TEXT_TOKENS = 12
WIDTH = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
PICTURE = 48  # pixels per side for LLaVA: 24 x 24 patches, the 576 image tokens of the pipeline's template
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
LLAMA = {name: DEFAULT_PROMPT_TEMPLATE[name] for name in ("template", "crop_start")}


def template_tokenizer(template: str, crop_start: int) -> PreTrainedTokenizerFast:
    """A word tokenizer for which the prefix of the pipeline's template has the length that the pipeline assumes."""
    before = template.partition("{}")[0]
    tokenizer = word_tokenizer(before=crop_start - len(re.findall(r"\w+", before)), limit=256)
    words_alone = pre_tokenizers.Split(Regex(r"\w+"), "removed", invert=True)
    tokenizer.backend_tokenizer.pre_tokenizer = words_alone
    return tokenizer


def llava_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of headers, words and punctuation, with image and prompt where the pipeline assumes them."""
    template = image_to_video.DEFAULT_PROMPT_TEMPLATE
    tokenizer = word_tokenizer(limit=256)
    tokenizer.add_tokens([*HEADERS, "<s>"], special_tokens=True)
    parts = pre_tokenizers.Split(Regex(r"\w{1,10}|[^\w\s]"), "removed", invert=True)
    tokenizer.backend_tokenizer.pre_tokenizer = parts
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", start)]
    )
    before = tokenizer(template["template"].partition("{}")[0]).input_ids
    assert len(before) == template["crop_start"]
    assert before.index(tokenizer.convert_tokens_to_ids("<image>")) == template["image_emb_start"]
    return tokenizer


def random_networks(**transformer: Any) -> dict[str, Any]:
    """Components of all variants: transformer, VAE, scheduler and CLIP."""
    tokenizer = word_tokenizer(after=1, limit=77)
    clip = CLIPTextConfig(vocab_size=len(tokenizer), num_hidden_layers=1, eos_token_id=1, **WIDTH)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    vae.decoder.conv_out.conv.weight.data *= 0.3  # rounding differences in latents stay small
    return {
        "transformer": HunyuanVideoTransformer3DModel(
            **{"in_channels": 4, **transformer}, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=1, num_single_layers=1, num_refiner_layers=1, mlp_ratio=1.0, text_embed_dim=16,
            pooled_projection_dim=16, rope_axes_dim=(4, 6, 6),
        ),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": CLIPTextModel(clip),
        "tokenizer_2": tokenizer,
    }  # fmt: skip


def random_hunyuan(folder: Path) -> None:
    """Write the pipeline."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts, tokenizer = random_networks(), template_tokenizer(**LLAMA)
        llama = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=4, num_key_value_heads=2, **WIDTH))
    HunyuanVideoPipeline(**parts, text_encoder=llama, tokenizer=tokenizer).save_pretrained(folder)


def random_hunyuan_image(folder: Path, **transformer: Any) -> None:
    """Write an image-to-video pipeline with one of the two transformer variants."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts, tokenizer = random_networks(**transformer), llava_tokenizer()
        parts |= {"tokenizer": tokenizer, "text_encoder": random_llava(tokenizer)}
    processor = CLIPImageProcessor(size={"shortest_edge": PICTURE}, crop_size={"height": PICTURE, "width": PICTURE})
    HunyuanVideoImageToVideoPipeline(**parts, image_processor=processor).save_pretrained(folder)


def random_llava(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    pad = tokenizer.pad_token_id
    llama = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=4, num_key_value_heads=2, pad_token_id=pad,
        max_position_embeddings=1024, **WIDTH,
    )  # fmt: skip
    vision = CLIPVisionConfig(num_hidden_layers=2, image_size=PICTURE, patch_size=2, **WIDTH)
    image = tokenizer.convert_tokens_to_ids("<image>")
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=llama, vision_config=vision, image_token_index=image, pad_token_id=pad)
    )


HUNYUAN = Case(
    random_hunyuan, VIDEO, TEXT_TOKENS, lora=("to_q", "to_k", "add_q_proj", "to_out.0"),
    options={"embedded_guidance": 4.0},
)  # fmt: skip
HUNYUAN_CONCAT = Case(
    partial(random_hunyuan_image, in_channels=2 * 4 + 1, image_condition_type="latent_concat", guidance_embeds=False),
    VIDEO, TEXT_TOKENS, hidden_frames=4,
)  # fmt: skip
HUNYUAN_FIRST_FRAME = Case(
    partial(random_hunyuan_image, image_condition_type="token_replace"), VIDEO, TEXT_TOKENS,
    options={"embedded_guidance": 4.0},
)  # fmt: skip
