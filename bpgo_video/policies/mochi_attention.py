"""How does Mochi attend? As `joint_attention.py` does, with rotary embeddings of each head's own."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bpgo_video.policies.joint_attention import JointAttention

Rotary = tuple[Float[Tensor, "tokens heads half"], Float[Tensor, "tokens heads half"]]  # cosines and sines


def rotated(x: Float[Tensor, "samples tokens heads head_dim"], rotary: Rotary) -> Tensor:
    """Neighbouring pairs of numbers turned by the angles of their token and head."""
    cos, sin = rotary
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def dispatch(transformer: nn.Module) -> None:
    """Let a Mochi transformer attend through the dispatcher, by the backend that was chosen for it."""
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]
        attn: Any = block.attn1  # type: ignore[union-attr]
        attn.processor = JointAttention(rotated, getattr(attn.processor, "_attention_backend", None))
