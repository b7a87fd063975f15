"""What does a checkpoint of VideoAlign hold? A Qwen2-VL with low-rank updates beside its layers, and a head."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from bpgo_video.rewards.backbones import from_weights
from bpgo_video.rewards.weights import read_weights

PREFIXES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "language_model."),
    ("model.", "language_model."),  # as transformers wrote it when the checkpoint was made
)
FILES = ("model_config.json", "checkpoint-*/model.pth")
DROPPED = ("lm_head.",)


class VideoRewardNetwork(nn.Module):
    """Qwen2-VL without its vocabulary's head, and the reward's head on its last hidden states."""

    def __init__(self, model: nn.Module, head: Tensor):
        super().__init__()
        self.model: Any = model
        self.head = nn.Parameter(head)


def read_settings(folder: Path) -> dict[str, Any]:
    """The folder's model_config.json: `data_config`, `peft_lora_config`, `inference_config` and others.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it lacks the means and standard deviations of the scores.
    """
    path = folder / "model_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no model_config.json; is it a folder of KwaiVGI/VideoReward's form?")
    settings = json.loads(path.read_text("utf-8"))
    if not settings.get("inference_config"):
        raise ValueError(f"{path} has no inference_config: the mean and std by which scores are normalised")
    return settings


def load_videoalign(folder: Path, base: Path, lora: dict[str, Any], dtype: torch.dtype) -> VideoRewardNetwork:
    """The network of the folder's last checkpoint, updates added to the weights, in `dtype`.

    The vocabulary has the checkpoint's size: its embeddings were cut when the special tokens were added.

    Args:
        base: folder of the Qwen2-VL that it was trained from, for its configuration.

    Raises:
        FileNotFoundError: no checkpoint-*/model.pth.
        ValueError: weights are missing, or of another model.
    """
    files = sorted(folder.glob(FILES[1]), key=lambda path: int(path.parent.name.split("-")[-1]))
    if not files:
        raise FileNotFoundError(f"{folder} has no {FILES[1]}")
    scale = lora["lora_alpha"] / (math.sqrt(lora["lora_r"]) if lora.get("use_rslora") else lora["lora_r"])
    weights = merged(read_weights(files[-1]), scale)
    if "rm_head.weight" not in weights or "language_model.embed_tokens.weight" not in weights:
        raise ValueError(f"{files[-1]} has no rm_head.weight and embeddings; it is no reward on Qwen2-VL")
    config: Any = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = weights["language_model.embed_tokens.weight"].shape[0]
    head = weights.pop("rm_head.weight").to(dtype)
    return VideoRewardNetwork(from_weights(Qwen2VLModel, config, weights, files[-1], dtype), head)


def merged(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale B A under Qwen2VLModel's names, of a state dict that peft wrapped.

    Raises:
        ValueError: an update of another form, or one without its weight.
    """
    found = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    updates = {name: found.pop(name) for name in list(found) if ".lora_" in name}
    result = {}
    for name, weight in found.items():
        layer = name.removesuffix(".base_layer.weight")
        if f"{layer}.lora_A.default.weight" in updates:
            down, up = (updates.pop(f"{layer}.lora_{which}.default.weight").float() for which in "AB")
            weight = (weight.float() + scale * up @ down).to(weight.dtype)
        if not name.startswith(DROPPED):
            result[_renamed(name.replace(".base_layer.", "."))] = weight
    if updates:
        raise ValueError(f"{len(updates)} low-rank updates have no linear layer, the first is {sorted(updates)[0]}")
    return result


def _renamed(name: str) -> str:
    for before, after in PREFIXES:
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
