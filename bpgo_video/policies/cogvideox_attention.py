"""How does CogVideoX attend? As diffusers' processor for it does, through the dispatcher that other families use.

diffusers' own calls PyTorch's attention directly, which neither a sequence group nor a choice of backend reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from jaxtyping import Float
from torch import Tensor, nn

from bpgo_video.distributed.ulysses import attend

Rotary = tuple[Float[Tensor, "tokens head_dim"], Float[Tensor, "tokens head_dim"]]  # cosines and sines


@dataclass
class CogVideoXAttention:
    """Joint attention of text tokens, which come first, and of the video's, which alone are rotated."""

    _attention_backend: Any = None  # set by diffusers' `set_attention_backend`
    _parallel_config: Any = None  # set by `parallelise`

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "samples tokens dim"],
        encoder_hidden_states: Float[Tensor, "samples text dim"],
        attention_mask: None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What video and text tokens take from each other; no token is masked."""
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (layer(joint).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = (rotated(x, image_rotary_emb, text) for x in (attn.norm_q(query), attn.norm_k(key)))
        found = attend(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        ).flatten(2)
        for layer in attn.to_out:
            found = layer(found)
        return found[:, text:], found[:, :text]


def rotated(x: Float[Tensor, "samples joint heads head_dim"], rotary: Rotary | None, text: int) -> Tensor:
    """The tokens behind the text rotated by their positions, where there are any."""
    if rotary is None:
        return x
    video: Any = apply_rotary_emb(x[:, text:], cast(Any, rotary), sequence_dim=1)  # both annotated as something else
    return torch.cat([x[:, :text], video], dim=1)


def dispatch(transformer: nn.Module) -> None:
    """Let a CogVideoX transformer attend through the dispatcher, by the backend that was chosen for it."""
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]
        attn: Any = block.attn1  # type: ignore[union-attr]
        attn.processor = CogVideoXAttention(getattr(attn.processor, "_attention_backend", None))
