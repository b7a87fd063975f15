"""HunyuanVideo 1.5: two text encoders and an image encoder, masks for all three, and guidance set by the pipeline."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tokenizers import Regex, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from bpgo_video.config.bpgo import VideoConfig
from tests.families.case import Case
from tests.made.random_wan import word_tokenizer

TEXTS = ('a red "circle" moving left', "a blue square moving up")  # the first one quotes a word to be rendered
TEXT_TOKENS = 12
TARGET_SIZE = 40  # 32 x 48 is one of the pipeline's sizes
IMAGE_SIDE = 16


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer for which the prefix of the chat template has the length that the pipeline assumes."""
    parameters = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters
    system_words = re.findall(r"\w+", parameters["system_message"].default)
    tokenizer = word_tokenizer(limit=1024)
    words_alone = pre_tokenizers.Split(Regex(r"\w+"), "removed", invert=True)
    tokenizer.backend_tokenizer.pre_tokenizer = words_alone
    filler = "start " * (parameters["crop_start"].default - len(system_words))
    tokenizer.chat_template = filler + "{{ messages[0].content }} {{ messages[1].content }} answer"
    return tokenizer


def random_texts() -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    byt5 = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {
        "text_encoder": Qwen2_5_VLTextModel(qwen), "tokenizer": tokenizer, "text_encoder_2": T5EncoderModel(byt5),
        "tokenizer_2": ByT5Tokenizer(),
    }  # fmt: skip


def random_images() -> dict[str, Any]:
    siglip = SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=IMAGE_SIDE,
        patch_size=8,
    )  # fmt: skip
    size = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    return {"image_encoder": SiglipVisionModel(siglip), "feature_extractor": SiglipImageProcessor(size=size)}


def random_hunyuan15(folder: Path, images: bool = False, **guider: Any) -> Path:
    """A pipeline of random weights.

    Args:
        images: image-to-video.
        guider: its settings.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = HunyuanVideo15Transformer3DModel(
            in_channels=2 * 4 + 1, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_refiner_layers=1, mlp_ratio=1.0, text_embed_dim=16, text_embed_2_dim=16, image_embed_dim=24,
            rope_axes_dim=(4, 6, 6), target_size=TARGET_SIZE, task_type="i2v" if images else "t2v",
        )  # fmt: skip
        vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1)
        parts = {**random_texts(), **(random_images() if images else {})}
    pipeline_class = HunyuanVideo15ImageToVideoPipeline if images else HunyuanVideo15Pipeline
    pipeline_class(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(**{"guidance_scale": 6.0, **guider}), **parts,
    ).save_pretrained(folder)  # fmt: skip
    return folder


LORA = ("to_q", "to_k", "add_q_proj", "to_out.0")
HUNYUAN_15 = Case(
    random_hunyuan15, VideoConfig(num_frames=9, height=48, width=48, fps=24.0), TEXT_TOKENS, lora=LORA, texts=TEXTS
)
HUNYUAN_15_IMAGE = Case(
    partial(random_hunyuan15, images=True), VideoConfig(num_frames=9, height=32, width=48, fps=24.0), TEXT_TOKENS,
    lora=LORA, texts=TEXTS,
)  # fmt: skip
