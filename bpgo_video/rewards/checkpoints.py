"""Checkpoints of other projects, read without running code, under the names that transformers uses."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel

Weights = Mapping[str, Tensor]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of one that torch.save wrote (a state dict, or one under `state_dict`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the pickle holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return load_file(path)
    found = unpickled(path)
    return found.get("state_dict", found)


def unpickled(path: Path) -> dict[str, Any]:
    """What torch.save wrote: tensors, and dictionaries of them.

    Raises:
        ValueError: the pickle holds more.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, and is not unpickled: {error}") from error


def complete(source: Path, unused: Sequence[str], model: nn.Module, loading: dict[str, Any]) -> nn.Module:
    """The model, if the checkpoint held all of it: transformers fills missing weights at random, with a warning.

    Raises:
        ValueError: names the first of the missing weights.
    """
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(tuple(unused)))
    wrong = missing or sorted(str(key) for key in loading["mismatched_keys"])
    if wrong:
        said = f"{len(wrong)} weights are missing or of another shape, the first is {wrong[0]}"
        raise ValueError(f"{source} does not hold a whole {type(model).__name__} ({said}); is it another class's?")
    return model


def from_weights(network: Any, config: Any, weights: Weights, source: Path, dtype: torch.dtype) -> nn.Module:
    """The transformers class `network` of `config` with weights converted from the file `source`.

    Raises:
        ValueError: weights are missing, unknown or of another shape.
    """
    settings = {"config": config, "state_dict": weights, "dtype": dtype, "output_loading_info": True}
    model, loading = network.from_pretrained(None, **settings)
    unknown = sorted(loading["unexpected_keys"])
    if unknown:
        raise ValueError(f"{source} holds weights that {network.__name__} lacks: {unknown[:3]}")
    return complete(source, (), model, loading)


def linear_layers(weights: Weights, path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer of an aesthetic head, in order, fp32.

    Raises:
        ValueError: the file holds something else than linear layers that lead to one number.
    """
    found = [name.removesuffix("weight") for name in weights if name.endswith("weight")]
    found.sort(key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
    layers = [(weights[f"{n}weight"].float(), weights[f"{n}bias"].float()) for n in found if f"{n}bias" in weights]
    fits = all(before.shape[0] == after.shape[1] for (before, _), (after, _) in pairwise(layers))
    if not layers or 2 * len(layers) != len(weights) or not fits or layers[-1][0].shape[0] != 1:
        raise ValueError(f"{path} holds {sorted(weights)}; an aesthetic head is a chain of linear layers to one number")
    return layers


BLOCK = r"transformer\.resblocks\.(\d+)\."
LAYER = r"encoder.layers.\1."
OPEN_CLIP = [
    ("logit_scale", "logit_scale"),
    (r"text_projection", "text_projection.weight"),
    (r"visual\.proj", "visual_projection.weight"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
]
for ours, theirs in (("text_model.", ""), ("vision_model.", r"visual\.")):
    OPEN_CLIP += [
        (f"{theirs}positional_embedding", f"{ours}embeddings.position_embedding.weight"),
        (rf"{theirs}{BLOCK}ln_(1|2)\.(weight|bias)", rf"{ours}{LAYER}layer_norm\2.\3"),
        (rf"{theirs}{BLOCK}attn\.out_proj\.(weight|bias)", rf"{ours}{LAYER}self_attn.out_proj.\2"),
        (rf"{theirs}{BLOCK}attn\.in_proj_(weight|bias)", rf"{ours}{LAYER}self_attn.*_proj.\2"),  # q, k and v in one
        (rf"{theirs}{BLOCK}mlp\.c_fc\.(weight|bias)", rf"{ours}{LAYER}mlp.fc1.\2"),
        (rf"{theirs}{BLOCK}mlp\.c_proj\.(weight|bias)", rf"{ours}{LAYER}mlp.fc2.\2"),
    ]


def from_open_clip(weights: Weights) -> dict[str, Tensor]:
    """The weights of an open_clip checkpoint under CLIPModel's names: q, k and v apart, projections as linear layers.

    Raises:
        ValueError: a weight that a CLIP of vision and text transformers does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        new = next((match.expand(new) for old, new in OPEN_CLIP if (match := re.fullmatch(old, name))), None)
        if new is None:
            raise ValueError(f"{name!r} is no weight of open_clip's CLIP with two transformers")
        if "*" in new:
            renamed |= {new.replace("*", part): rows.clone() for part, rows in zip("qkv", weight.chunk(3), strict=True)}
        else:
            renamed[new] = weight.T.contiguous() if "projection" in new else weight
    return renamed


VIDEOALIGN_FILES = ("model_config.json", "checkpoint-*/model.pth")
QWEN_NAMES = (  # the second as transformers named it when the checkpoint was made
    (r"^model\.(visual|language_model)\.", r"\1."),
    (r"^model\.", "language_model."),
)


class VideoRewardNetwork(nn.Module):
    """VideoAlign's network: Qwen2-VL without the vocabulary's head, and the reward's head on its last hidden states."""

    def __init__(self, model: nn.Module, head: Tensor):
        super().__init__()
        self.model: Any = model
        self.head = nn.Parameter(head)


def read_videoalign_settings(folder: Path) -> dict[str, Any]:
    """The folder's model_config.json: `data_config`, `peft_lora_config`, `inference_config` and others.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it lacks the means and standard deviations of the scores.
    """
    path = folder / "model_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no model_config.json; is it a folder like KwaiVGI/VideoReward?")
    settings = json.loads(path.read_text("utf-8"))
    if not settings.get("inference_config"):
        raise ValueError(f"{path} has no inference_config: the mean and std that normalise the scores")
    return settings


def load_videoalign(folder: Path, base: Path, lora: dict[str, Any], dtype: torch.dtype) -> VideoRewardNetwork:
    """The network of the folder's last checkpoint with its LoRA updates merged, in `dtype`.

    The vocabulary has the checkpoint's size: its embeddings were cut when the special tokens were added.

    Args:
        base: folder of the Qwen2-VL that it was trained from, for its configuration.

    Raises:
        FileNotFoundError: no checkpoint-*/model.pth.
        ValueError: weights are missing, or of another model.
    """
    files = sorted(folder.glob(VIDEOALIGN_FILES[1]), key=lambda path: int(path.parent.name.split("-")[-1]))
    if not files:
        raise FileNotFoundError(f"{folder} has no {VIDEOALIGN_FILES[1]}")
    scale = lora["lora_alpha"] / (math.sqrt(lora["lora_r"]) if lora.get("use_rslora") else lora["lora_r"])
    weights = merge_lora(read_weights(files[-1]), scale)
    if "rm_head.weight" not in weights or "language_model.embed_tokens.weight" not in weights:
        raise ValueError(f"{files[-1]} has no rm_head.weight and embeddings; it is no reward on Qwen2-VL")
    config: Any = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = weights["language_model.embed_tokens.weight"].shape[0]
    head = weights.pop("rm_head.weight").to(dtype)
    return VideoRewardNetwork(from_weights(Qwen2VLModel, config, weights, files[-1], dtype), head)


def merge_lora(weights: Weights, scale: float) -> dict[str, Tensor]:
    """W + scale B A under Qwen2VLModel's names, from a state dict that peft wrapped.

    Raises:
        ValueError: an update of another form, or one without its weight.
    """
    found = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    updates = {name: found.pop(name) for name in list(found) if ".lora_" in name}
    merged = {}
    for name, weight in found.items():
        layer = name.removesuffix(".base_layer.weight")
        if f"{layer}.lora_A.default.weight" in updates:
            down, up = (updates.pop(f"{layer}.lora_{part}.default.weight").float() for part in "AB")
            weight = (weight.float() + scale * up @ down).to(weight.dtype)
        if name.startswith("lm_head."):
            continue
        name = name.replace(".base_layer.", ".")
        for old, new in QWEN_NAMES:
            name = re.sub(old, new, name)
        merged[name] = weight
    if updates:
        raise ValueError(f"{len(updates)} LoRA updates have no linear layer, the first is {sorted(updates)[0]}")
    return merged
