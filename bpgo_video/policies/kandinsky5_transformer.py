"""What must be said to diffusers' Kandinsky 5 transformer before it trains? Three things that its pipeline sees to.

Texts are padded to one length (`parallel/kandinsky5_attention.py`). All weights have one dtype, where the pipeline
keeps the embedding of time in fp32. And ZeRO-3's construction in bf16 rounds the frequencies that time is embedded by:
angles would be radians off.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_kandinsky import get_freqs
from torch import Tensor, nn

from bpgo_video.parallel.kandinsky5_attention import mask_padding


def prepare(transformer: Any) -> None:
    """Let it take padded texts, and compute in one dtype; once, before the engine takes it."""
    mask_padding(transformer)
    time = transformer.time_embeddings
    time.freqs = get_freqs(time.model_dim // 2, time.max_period)  # no buffer, so that nothing else puts it right
    time.in_layer.register_forward_pre_hook(in_weights_dtype)


def in_weights_dtype(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """The layer's input in the dtype of its weight."""
    return (args[0].to(layer.weight.dtype),)  # type: ignore[arg-type]
