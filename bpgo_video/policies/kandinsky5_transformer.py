"""What must be said to diffusers' Kandinsky 5 transformer before it trains? Three things that its pipeline sees to.

Texts are padded to one length (`parallel/kandinsky5_attention.py`). All weights have one dtype, where the pipeline
keeps the embedding of time in fp32. And tables are cast with the weights, or by ZeRO-3's construction: angles of
positions and of time, whose cosines are taken, would be radians off in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_kandinsky import get_freqs
from torch import Tensor, nn

from bpgo_video.parallel.kandinsky5_attention import mask_padding


def prepare(transformer: Any) -> None:
    """Let it take padded texts, and compute in one dtype; once, before the engine takes it."""
    mask_padding(transformer)
    time = transformer.time_embeddings
    time.freqs = get_freqs(time.model_dim // 2, time.max_period)  # no buffer: nothing else puts it right
    time.in_layer.register_forward_pre_hook(in_weights_dtype)
    for rope, size in ((transformer.text_rope_embeddings, "dim"), (transformer.visual_rope_embeddings, "axes_dims")):
        exact = type(rope)(getattr(rope, size), rope.max_pos, rope.max_period)
        rope.register_forward_pre_hook(partial(put_back, dict(exact.named_buffers())))


def in_weights_dtype(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """The layer's input in the dtype of its weight."""
    return (args[0].to(layer.weight.dtype),)  # type: ignore[arg-type]


def put_back(exact: Mapping[str, Tensor], module: nn.Module, _: tuple[Any, ...]) -> None:
    """Give a module its fp32 buffers again, once they were cast."""
    for name, buffer in module.named_buffers():
        if buffer.dtype != torch.float32:
            buffer.data = exact[name].to(buffer.device)
