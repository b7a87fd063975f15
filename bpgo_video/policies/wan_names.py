"""What did Wan's authors call each tensor? The names that ComfyUI and the original code use (github.com/Wan-Video)."""

from __future__ import annotations

import re

ORIGINAL = {  # diffusers' name -> the authors'
    r"condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"condition_embedder\.image_embedder\.ff\.net\.0\.proj": "img_emb.proj.1",
    r"condition_embedder\.image_embedder\.ff\.net\.2": "img_emb.proj.3",
    r"condition_embedder\.image_embedder\.norm1": "img_emb.proj.0",
    r"condition_embedder\.image_embedder\.norm2": "img_emb.proj.4",
    r"condition_embedder\.image_embedder\.pos_embed": "img_emb.emb_pos",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"^proj_out": "head.head",
    r"^scale_shift_table": "head.modulation",
    r"\.scale_shift_table": ".modulation",
    r"^(blocks\.\d+)\.norm2": r"\1.norm3",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_out\.0$": ".o",
    r"\.to_([qkv])$": r".\1",
    r"\.add_([kv])_proj$": r".\1_img",
    r"\.norm_added_k$": ".norm_k_img",
    r"\.ffn\.net\.0\.proj$": ".ffn.0",
    r"\.ffn\.net\.2$": ".ffn.2",
}


def original_name(name: str) -> str:
    """The authors' name of a layer or a tensor of diffusers' Wan transformer."""
    layer, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        layer, dot, kind = name, "", ""
    for ours, theirs in ORIGINAL.items():
        layer = re.sub(ours, theirs, layer)
    return layer + dot + kind
