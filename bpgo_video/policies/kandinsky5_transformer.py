"""Two changes that diffusers' Kandinsky 5 transformer needs before it trains.

Texts are padded to one length (`policies/kandinsky5_attention.py`). And ZeRO-3's construction in bf16 rounds the
frequencies of the time embedding, which are no buffer: angles would be radians off.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_kandinsky import get_freqs

from bpgo_video.policies.kandinsky5_attention import mask_padding


def prepare(transformer: Any) -> None:
    """Mask padded texts and restore the time embedding's frequencies; once, before the engine takes the model."""
    mask_padding(transformer)
    time = transformer.time_embeddings
    time.freqs = get_freqs(time.model_dim // 2, time.max_period)
