"""Ulysses sequence parallelism (arXiv 2309.14509): all-to-all around self-attention.

Outside attention, rank s of a sequence group of S ranks holds the s-th run of a video's tokens with all heads. Inside
attention it holds all tokens with the s-th run of heads. The text tokens of joint attention are whole on every rank.

Gradients: all S ranks compute the same loss L from the gathered output. The backward of every function here is the
adjoint of its forward over the group, as if the group's sum S L were differentiated. The S ranks' gradients of a
parameter are then parts of d(S L)/dp, and their mean is dL/dp. So DeepSpeed's plain mean over the world is the gradient
of a single process, without any scaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from jaxtyping import Float
from torch import Tensor

Tokens = Float[Tensor, "samples tokens heads head_dim"]
Keys = Float[Tensor, "samples keys heads head_dim"]  # in cross-attention their number differs from the queries'
TOKENS, HEADS = 1, 2  # dimensions


def _all_to_all(x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
    """Split dimension `split` over the ranks and join the ranks' parts along dimension `join`."""
    rows = x.unflatten(split, (dist.get_world_size(group), -1)).movedim(split, 0).contiguous()  # row s: to rank s
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows, group=group)
    return received.movedim(0, join).flatten(join, join + 1)


class AllToAll(torch.autograd.Function):
    """`_all_to_all`; its adjoint swaps `split` and `join`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        return _all_to_all(x, group, split, join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.group, ctx.join, ctx.split), None, None, None


class Gathered(torch.autograd.Function):
    """All ranks' parts, concatenated along `dim` in rank order.

    The adjoint sums the gradients over the ranks and takes this rank's part. Without the sum, the contributions of the
    other ranks' losses to this part would be lost: a factor S.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group), ctx.dim)[dist.get_rank(ctx.group)], None, None


@dataclass
class Ulysses:
    """Self-attention over the ranks of a sequence group; attention processors carry it as their `_parallel_config`.

    Attributes:
        group: the ranks that share samples.
        text_first: whether the text tokens of joint attention precede the video's.
        tokens: the video's token count in the current forward, without padding.
    """

    group: dist.ProcessGroup
    text_first: bool = False
    tokens: int = 0

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's run along `dim`, zero-padded to equal lengths. The adjoint is local."""
        each = -(-x.shape[dim] // self.size)
        padding = [0, 0] * (x.ndim - dim - 1) + [0, each * self.size - x.shape[dim]]
        return F.pad(x, padding).narrow(dim, self.rank * each, each)

    def held(self, first: int) -> int:
        """How many of the video's first `first` tokens are in this rank's run."""
        each = -(-self.tokens // self.size)
        return min(max(first - self.rank * each, 0), each)

    @torch.compiler.disable  # compiled blocks exchange outside what is compiled
    def join(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of `split`: all ranks' runs along `dim`, without padding."""
        return Gathered.apply(x, self.group, dim).narrow(dim, 0, self.tokens)

    @torch.compiler.disable  # likewise
    def attention(self, query: Tokens, key: Tokens, value: Tokens, **options: Any) -> Tokens:
        """Attention of this rank's video tokens and of all text tokens to all tokens.

        Padding is dropped before attention, so it needs no mask; a mask in `options` covers all tokens.
        """
        text = query.shape[1] - -(-self.tokens // self.size)
        query, key, value = self._heads(torch.cat([query, key, value]), text).chunk(3)
        before, video, after = self._split_text(dispatch_attention_fn(query, key, value, **options), text)
        padded = F.pad(video, (0, 0, 0, 0, 0, -self.tokens % self.size))
        video = AllToAll.apply(padded, self.group, TOKENS, HEADS)
        return torch.cat([self._all_heads(before), video, self._all_heads(after)], dim=TOKENS)

    def _heads(self, x: Tokens, text: int) -> Tensor:
        """All tokens with this rank's heads, from this rank's tokens with all heads."""
        before, video, after = self._split_text(x, text)
        video = AllToAll.apply(video, self.group, HEADS, TOKENS)[:, : self.tokens]
        heads = slice(self.rank * video.shape[HEADS], (self.rank + 1) * video.shape[HEADS])
        return torch.cat([before[:, :, heads], video, after[:, :, heads]], dim=TOKENS)

    def _split_text(self, x: Tokens, text: int) -> tuple[Tensor, ...]:
        """Text tokens before the video, the video's tokens, text tokens after it; one of the texts is empty."""
        video = x.shape[TOKENS] - text
        return x.split([text, video, 0] if self.text_first else [0, video, text], dim=TOKENS)

    def _all_heads(self, text: Tokens) -> Tensor:
        if text.shape[TOKENS] == 0:
            return text.repeat(1, 1, self.size, 1)  # empty, with the shape of all heads
        return Gathered.apply(text, self.group, HEADS)


def attend(query: Tokens, key: Keys, value: Keys, *, parallel_config: Any = None, **options: Any) -> Tokens:
    """diffusers' attention; sequence-parallel if `parallel_config` is a `Ulysses`."""
    if isinstance(parallel_config, Ulysses):
        return parallel_config.attention(query, key, value, **options)
    return dispatch_attention_fn(query, key, value, parallel_config=parallel_config, **options)
