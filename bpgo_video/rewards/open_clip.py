"""What are the weights of an open_clip checkpoint called in transformers' CLIPModel?"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

TOWERS = {"": "text_model", "visual.": "vision_model"}
NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under CLIPModel's names: q, k and v apart, projections as linear layers.

    Raises:
        ValueError: a weight that a CLIP of vision and text transformers does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        block = BLOCK.fullmatch(name)
        if name in NAMES:
            renamed[NAMES[name]] = weight
        elif name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = weight.T.contiguous()
        elif block is not None:
            renamed |= _in_block(block, weight)
        else:
            raise ValueError(f"{name!r} is no weight of open_clip's CLIP with two transformers")
    return renamed


def _in_block(block: re.Match[str], weight: Tensor) -> dict[str, Tensor]:
    tower, layer, part, kind = block.groups(default="")
    prefix = f"{TOWERS[tower]}.encoder.layers.{layer}"
    if part == "attn.in_proj":
        return {
            f"{prefix}.self_attn.{which}_proj.{kind}": rows.clone()
            for which, rows in zip("qkv", weight.chunk(3), strict=True)
        }
    if part not in IN_BLOCKS:
        raise ValueError(f"{block.string!r} is no weight of open_clip's CLIP with two transformers")
    return {f"{prefix}.{IN_BLOCKS[part]}.{kind}": weight}
