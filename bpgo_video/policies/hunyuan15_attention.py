"""How does HunyuanVideo 1.5 attend? As `joint_attention.py` does, where diffusers masks a square of all tokens."""

from __future__ import annotations

from typing import Any, cast

from diffusers.models.embeddings import apply_rotary_emb
from jaxtyping import Float
from torch import Tensor, nn

from bpgo_video.policies.joint_attention import JointAttention

Rotary = tuple[Float[Tensor, "tokens head_dim"], Float[Tensor, "tokens head_dim"]]  # cosines and sines


def rotated(x: Float[Tensor, "samples tokens heads head_dim"], rotary: Rotary) -> Tensor:
    """Turned by the angles of their token, the same for every head."""
    return cast(Tensor, apply_rotary_emb(x, cast(Any, rotary), sequence_dim=1))  # annotated as something else


def dispatch(transformer: nn.Module) -> None:
    """Let a HunyuanVideo 1.5 transformer attend with a mask of keys, by the backend that was chosen for it."""
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]
        attn: Any = block.attn  # type: ignore[union-attr]
        attn.processor = JointAttention(rotated, attn.processor._attention_backend)
