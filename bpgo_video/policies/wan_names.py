"""What did Wan's authors call each layer? The names that ComfyUI and the original code use (github.com/Wan-Video)."""

from __future__ import annotations

import re

ORIGINAL = {  # diffusers' name -> the authors'
    r"condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"condition_embedder\.image_embedder\.ff\.net\.0\.proj": "img_emb.proj.1",
    r"condition_embedder\.image_embedder\.ff\.net\.2": "img_emb.proj.3",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"^proj_out": "head.head",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_out\.0$": ".o",
    r"\.to_([qkv])$": r".\1",
    r"\.add_([kv])_proj$": r".\1_img",
    r"\.ffn\.net\.0\.proj$": ".ffn.0",
    r"\.ffn\.net\.2$": ".ffn.2",
}


def original_layer(name: str) -> str:
    """The authors' name of a linear layer of diffusers' Wan transformer."""
    for ours, theirs in ORIGINAL.items():
        name = re.sub(ours, theirs, name)
    return name
