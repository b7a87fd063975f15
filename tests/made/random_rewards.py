"""Random reward models, small but in their exact file formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    VideoPrismClipModel,
    VideoPrismConfig,
    ViTConfig,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
    XCLIPConfig,
    XCLIPModel,
)

WORDS = ("a", "red", "green", "circle", "square", "moving", "left", "right", "and", "then", "stops")
LENGTH = 8
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": 16, "max_position_embeddings": LENGTH}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
ENDS = {"bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}
MEAN, STD = [0.48, 0.45, 0.4], [0.27, 0.26, 0.28]


def tokenizer(ends: bool = True) -> PreTrainedTokenizerFast:
    """A word tokenizer that appends an end token to each text."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "<s>", *WORDS))}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        found.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def write(
    folder: Path, network: Any, config: Any, preprocessor: dict[str, Any], seed: int = 0, **tokenizing: bool
) -> Path:
    """Write a random model of `config` whose weights are large enough to distinguish inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            elif "bias" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    tokenizer(**tokenizing).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def crops(edge: int, size: int, resample: int = 3) -> dict[str, Any]:
    return {
        "size": {"shortest_edge": edge},
        "crop_size": {"height": size, "width": size},
        "resample": resample,
        "image_mean": MEAN,
        "image_std": STD,
    }


def stretches(size: int, resample: int = 2) -> dict[str, Any]:
    return {
        "size": {"height": size, "width": size},
        "resample": resample,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def clip_config(act: str = "quick_gelu") -> CLIPConfig:
    return CLIPConfig(
        text_config={**TEXT, **ENDS, "hidden_act": act}, vision_config={**VISION, "hidden_act": act}, projection_dim=16
    )


def random_clip(folder: Path, seed: int = 0, act: str = "quick_gelu") -> Path:
    return write(folder, CLIPModel, clip_config(act), crops(28, 28), seed)


def random_siglip(folder: Path) -> Path:
    config = SiglipConfig(
        text_config={**TEXT, **ENDS, "projection_size": 24}, vision_config={**VISION, "vision_use_head": True}
    )
    return write(folder, SiglipModel, config, stretches(28))


def random_dino(folder: Path, seed: int = 0) -> Path:
    return write(folder, Dinov2Model, Dinov2Config(**VISION), crops(32, 28), seed)


def random_vit(folder: Path) -> Path:
    """A ViT saved without a pooler, like facebook/dino-vitb16."""
    write(folder, ViTModel, ViTConfig(**VISION), crops(32, 28))
    ViTModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    return folder


def random_xclip(folder: Path) -> Path:
    mit = {"mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}
    config = XCLIPConfig(
        text_config={**TEXT, **ENDS},
        vision_config={**VISION, **mit, "num_frames": 4},
        projection_dim=16,
        prompt_num_attention_heads=2,
    )
    return write(folder, XCLIPModel, config, crops(28, 28, resample=2))


def random_videoprism(folder: Path) -> Path:
    vision = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 12}
    vision |= {"tubelet_size": [1, 6, 6], "num_frames": 4, "num_spatial_layers": 1, "num_temporal_layers": 1}
    config = VideoPrismConfig(
        text_config={**TEXT, "hidden_size": 24}, vision_config={**vision, "num_auxiliary_layers": 1}
    )
    return write(folder, VideoPrismClipModel, config, stretches(12, resample=3), ends=False)


def random_vjepa(folder: Path) -> Path:
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 2}
    config = VJEPA2Config(
        crop_size=28, patch_size=14, frames_per_clip=8, hidden_size=24, num_attention_heads=2, num_hidden_layers=2,
        **predictor,
    )  # fmt: skip
    return write(folder, VJEPA2Model, config, crops(32, 28, resample=2))


def random_clap(folder: Path, fusion: bool = False) -> Path:
    """A CLAP that reads 10 seconds at 48 kHz as laion/clap-htsat-unfused does."""
    text = {**TEXT, "max_position_embeddings": 32, "type_vocab_size": 1, "pad_token_id": 0}
    sound = {"patch_embeds_hidden_size": 8, "hidden_size": 16}
    sound |= {"depths": [1, 1], "num_attention_heads": [1, 2], "enable_fusion": fusion}
    config = ClapConfig(text_config=text, audio_config=sound, projection_dim=16)
    write(folder, ClapModel, config, {})
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder)
    return folder
