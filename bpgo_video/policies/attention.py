"""Joint attention of a video's tokens and padded text, through diffusers' dispatcher, with one mask of keys.

diffusers' own processors remove padding sample by sample (Mochi) or mask all pairs of tokens (HunyuanVideo 1.5), which
takes gigabytes for a video of a few seconds. Padding need not be masked as queries, since nothing reads its output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bpgo_video.distributed.ulysses import Ulysses, attend

Rotary = tuple[Tensor, Tensor]  # cosines and sines, a row for each of the video's tokens
Rotate = Callable[[Float[Tensor, "samples tokens heads head_dim"], Rotary], Tensor]


@dataclass
class JointAttention:
    """Joint attention of the video's tokens, which come first and are rotated, and of text tokens.

    Attributes:
        rotate: turns queries and keys by their positions.
    """

    rotate: Rotate
    _attention_backend: Any = None  # set by diffusers' `set_attention_backend`
    _parallel_config: Any = None  # set by `parallelise`

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "samples tokens dim"],
        encoder_hidden_states: Float[Tensor, "samples text text_dim"],
        attention_mask: Bool[Tensor, "samples text"] | Int[Tensor, "samples text"],
        image_rotary_emb: Rotary,
    ) -> tuple[Tensor, Tensor]:
        """The attention's output for video and text tokens."""
        query, key, value = _by_head(attn, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        query, key = (self.rotate(x, image_rotary_emb) for x in (attn.norm_q(query), attn.norm_k(key)))
        of_text = _by_head(attn, encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_query, text_key, text_value = attn.norm_added_q(of_text[0]), attn.norm_added_k(of_text[1]), of_text[2]
        pairs = ((query, text_query), (key, text_key), (value, text_value))
        local, group = hidden_states.shape[1], self._parallel_config
        tokens = group.tokens if isinstance(group, Ulysses) else local
        output = attend(
            *(torch.cat(pair, dim=1) for pair in pairs),
            attn_mask=F.pad(attention_mask.bool(), (tokens, 0), value=True)[:, None, None],
            backend=self._attention_backend,
            parallel_config=group,
        ).flatten(2)
        video, text = output[:, :local], output[:, local:]
        for layer in attn.to_out:
            video = layer(video)
        return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _by_head(attn: Any, x: Tensor, *layers: nn.Module) -> list[Tensor]:
    return [layer(x).unflatten(2, (attn.heads, -1)) for layer in layers]


def replace_processors(transformer: Any, attention: str, processor: Callable[..., Any], *arguments: Any) -> None:
    """Give each block's `attention` a new processor, with the backend that was chosen for the old one."""
    for block in transformer.transformer_blocks:
        module = getattr(block, attention)
        backend = getattr(module.processor, "_attention_backend", None)
        module.processor = processor(*arguments, _attention_backend=backend)
