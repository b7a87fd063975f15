"""How does Kandinsky 5 attend to texts of several lengths? As diffusers' processor does, with padding masked.

diffusers' transformer knows no mask: its pipeline leaves a text unpadded, and pads to the longest of a batch. Here all
texts have one length, and each is computed as if it were alone. The mask travels within what every block is handed, so
that a block which is computed again in the backward has its own: padding has a rotation of zeros, and states of zeros
behind the text's blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from jaxtyping import Bool, Float
from torch import Tensor, nn

PADDING = -1  # the position of a token that is none


class TextAttention:
    """Attention to text tokens: of the text itself, rotated by its positions, or of the video.

    Other backends than PyTorch's own take no mask, so that `policy.attention_backend` is the video's own attention's.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "samples tokens dim"],
        encoder_hidden_states: Float[Tensor, "samples text dim"] | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: None = None,
    ) -> Float[Tensor, "samples tokens dim"]:
        """What the tokens take from the text."""
        texts = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(2, (attn.num_heads, -1))
            for layer, x in ((attn.to_query, hidden_states), (attn.to_key, texts), (attn.to_value, texts))
        )
        query, key = attn.query_norm(query.float()).type_as(value), attn.key_norm(key.float()).type_as(value)
        if rotary_emb is None:
            mask = texts.any(dim=2)
        else:
            mask, (query, key) = real_tokens(rotary_emb), (rotated(x, rotary_emb) for x in (query, key))
        found = dispatch_attention_fn(
            query, key, value, attn_mask=mask[:, None, None], backend=AttentionBackendName.NATIVE
        )
        return attn.out_layer(found.flatten(2))


class Rounded(torch.autograd.Function):
    """fp32 numbers rounded to bf16, and gradients as they are.

    The ranks of a sequence group find parts of a text's gradient, whose sum has to be that of a single process.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def rotated(x: Float[Tensor, "samples tokens heads head_dim"], rope: Tensor) -> Tensor:
    """Each pair of numbers times its token's matrix; rounded to bf16, as diffusers rounds it in every dtype."""
    pairs = x.float().unflatten(3, (-1, 1, 2))
    return Rounded.apply((rope * pairs).sum(dim=-1).reshape(x.shape)).type_as(x)


def real_tokens(rope: Tensor) -> Bool[Tensor, "samples text"]:
    """Which text tokens are no padding, by their rotations [1 samples text 1 half 2 2]; one row where all share it."""
    return rope.flatten(-4).any(dim=-1).reshape(-1, rope.shape[-5])


def no_rotation_of_padding(_: nn.Module, args: tuple[Tensor], rope: Tensor) -> Tensor:
    """Matrices of zeros where the position is `PADDING`."""
    return rope * (args[0] != PADDING)[..., None, None, None, None]


def no_states_of_padding(_: nn.Module, args: tuple[Tensor, Tensor, Tensor], texts: Tensor) -> Tensor:
    """States of zeros where the rotation, a block's third argument, is of zeros."""
    return texts * real_tokens(args[2])[..., None]


def mask_padding(transformer: Any) -> None:
    """Let a Kandinsky 5 transformer leave out text tokens at the position `PADDING`."""
    for block in transformer.text_transformer_blocks:
        block.self_attention.set_processor(TextAttention())
    for block in transformer.visual_transformer_blocks:
        block.cross_attention.set_processor(TextAttention())
    transformer.text_rope_embeddings.register_forward_hook(no_rotation_of_padding)
    transformer.text_transformer_blocks[-1].register_forward_hook(no_states_of_padding)
