"""Random Qwen-VL models and a VideoAlign checkpoint, small but in their exact file formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|video_pad|>", "<|vision_end|>", "<|image_pad|>")
WORDS = ("user", "assistant", "Yes", "No", "does", "it", "show", "a", "red", "circle", "rate", "the", "seconds")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEAN, STD = [0.48, 0.45, 0.4], [0.27, 0.26, 0.28]
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
TOWER = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2}
KINDS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        Qwen2VLForConditionalGeneration, Qwen2VLConfig, {}, {"embed_dim": 16, "hidden_size": 32, "patch_size": 14},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, {},
        {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "patch_size": 14,
         "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        Qwen3VLForConditionalGeneration, Qwen3VLConfig, {"head_dim": 8},
        {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "patch_size": 16,
         "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = ("<pad>", "<end>", "<unk>", *SPECIAL, *WORDS)
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    fast.add_tokens(list(SPECIAL), special_tokens=True)
    fast.chat_template = CHAT
    return fast


def spread_out(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
        elif "bias" in name:
            nn.init.normal_(parameter, std=0.05)


def random_qwen(folder: Path, kind: str) -> Path:
    network, config, text, tower = KINDS[kind]
    found = tokenizer()
    names = {"video_token_id": "<|video_pad|>", "image_token_id": "<|image_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network(
            config(
                text_config={**TEXT, **text, "rope_parameters": ROPE},
                vision_config={**TOWER, **tower},
                **{key: found.convert_tokens_to_ids(token) for key, token in names.items()},
            )
        )
        spread_out(model)
    model.save_pretrained(folder)
    found.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


NORMALISATION = {"VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811}
NORMALISATION |= {"TA_mean": 2.8105, "TA_std": 2.5121}


def random_videoalign(folder: Path, base: Path, outputs: int) -> tuple[PeftModel, torch.Tensor]:
    """Write model_config.json and checkpoint-7/model.pth as VideoAlign does; return the peft model and the head.

    Weights have the names of the transformers version of that time; the vocabulary is cut to the tokenizer's length.
    """
    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer()) + 3)
        targets = r"model\.language_model\.layers\..*(q_proj|v_proj|up_proj)"
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets)).eval()
        spread_out(peft)
        head = torch.randn(outputs, 32)
    state = {name.replace("model.model.language_model.", "model.model."): w for name, w in peft.state_dict().items()}
    state = {name.replace("model.model.visual.", "model.visual."): w for name, w in state.items()}
    (folder / "checkpoint-7").mkdir(parents=True)
    torch.save({**state, "base_model.model.rm_head.weight": head}, folder / "checkpoint-7" / "model.pth")
    settings = {
        "data_config": {"fps": 2.0, "max_frame_pixels": 200704},
        "peft_lora_config": {"lora_r": 4, "lora_alpha": 6, "use_rslora": False},
        "inference_config": NORMALISATION,
    }
    (folder / "model_config.json").write_text(json.dumps(settings))
    return peft, head
