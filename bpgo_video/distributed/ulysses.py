"""How does attention see all tokens where each rank holds a part of them? By all-to-all: Ulysses (arXiv 2309.14509).

Between attentions, rank s of a sequence group of S ranks holds the s-th run of a video's tokens and all heads; within
attention it holds all tokens and the s-th run of heads. Text tokens of joint attention are whole on every rank.

Gradients. All S ranks compute the same loss L from the gathered output. Every function here has as its backward the
adjoint of its forward over the group, as if the total S L of the group were differentiated. What the S ranks find for a
parameter are then parts of d(S L)/dp, and their mean is dL/dp. So DeepSpeed's plain mean over the world, over S ranks
times the data-parallel groups, is the single-process gradient: nothing is scaled, here or anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from jaxtyping import Float
from torch import Tensor

Tokens = Float[Tensor, "samples tokens heads head_dim"]
Keys = Float[Tensor, "samples keys heads head_dim"]  # of cross-attention there are others than queries
Move = Callable[[Tensor, dist.ProcessGroup], Tensor]


def _exchange(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row s goes to rank s; row s of the result is what rank s sent."""
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, rows.contiguous(), group=group)
    return received


def _scatter_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[samples, tokens/S, heads, d] -> [samples, tokens, heads/S, d]."""
    size = dist.get_world_size(group)
    rows = x.unflatten(2, (size, -1)).movedim(2, 0)  # ranks samples tokens/S heads/S head_dim
    return _exchange(rows, group).movedim(0, 1).flatten(1, 2)


def _scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[samples, tokens, heads/S, d] -> [samples, tokens/S, heads, d]."""
    size = dist.get_world_size(group)
    rows = x.unflatten(1, (size, -1)).movedim(1, 0)  # ranks samples tokens/S heads/S head_dim
    return _exchange(rows, group).movedim(0, 2).flatten(2, 3)


class Scattered(torch.autograd.Function):
    """One of the two moves above; the other is its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, move: Move, adjoint: Move) -> Tensor:
        ctx.group, ctx.adjoint = group, adjoint
        return move(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.adjoint(grads[0], ctx.group), None, None, None


class Gathered(torch.autograd.Function):
    """Every rank's part along `dim`, joined in the order of ranks.

    The adjoint sums the gradients of all ranks and takes this rank's part: to slice without the sum would lose what the
    other ranks' losses owe to this part, a factor S.
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
    """A policy's self-attention over the ranks of a sequence group; it rests on the attention processors.

    Attributes:
        group: the ranks that share samples.
        text_first: whether text tokens of joint attention stand before the video's.
        tokens: of the video in the forward that is under way, whole and without padding.
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
        """This rank's run along `dim`, zeros behind the end so that runs are equal. Its adjoint is local."""
        each = -(-x.shape[dim] // self.size)
        padding = [0, 0] * (x.ndim - dim - 1) + [0, each * self.size - x.shape[dim]]
        return F.pad(x, padding).narrow(dim, self.rank * each, each)

    def held(self, first: int) -> int:
        """How many of the video's first tokens are in this rank's run."""
        each = -(-self.tokens // self.size)
        return min(max(first - self.rank * each, 0), each)

    def join(self, x: Tensor, dim: int) -> Tensor:
        """The whole of what `split` parted, padding dropped."""
        return Gathered.apply(x, self.group, dim).narrow(dim, 0, self.tokens)

    def attention(self, query: Tokens, key: Tokens, value: Tokens, **options: Any) -> Tokens:
        """Attention of this rank's video tokens, and of the text tokens beside them, to all tokens.

        Padding leaves before attention, so it needs no mask; a mask in `options` is one over all tokens.
        """
        text = query.shape[1] - -(-self.tokens // self.size)
        whole = self._whole(torch.cat([query, key, value]), text)
        query, key, value = whole.chunk(3)
        attended = dispatch_attention_fn(query, key, value, **options)
        before, video, behind = self._parts(attended, text, self.tokens)
        missing = -self.tokens % self.size
        video = Scattered.apply(F.pad(video, (0, 0, 0, 0, 0, missing)), self.group, _scatter_tokens, _scatter_heads)
        return torch.cat([self._all_heads(before), video, self._all_heads(behind)], dim=1)

    def _whole(self, x: Tokens, text: int) -> Tensor:
        """All tokens with this rank's heads, of this rank's tokens with all heads."""
        before, video, behind = self._parts(x, text, x.shape[1] - text)
        video = Scattered.apply(video, self.group, _scatter_heads, _scatter_tokens)[:, : self.tokens]
        own = slice(self.rank * video.shape[2], (self.rank + 1) * video.shape[2])
        return torch.cat([before[:, :, own], video, behind[:, :, own]], dim=1)

    def _parts(self, x: Tokens, text: int, video: int) -> tuple[Tensor, ...]:
        sizes = [text, video, 0] if self.text_first else [0, video, text]
        return x.split(sizes, dim=1)

    def _all_heads(self, text: Tokens) -> Tensor:
        if text.shape[1] == 0:
            return text.repeat(1, 1, self.size, 1)  # nothing, in the shape of all heads
        return Gathered.apply(text, self.group, 2)


def attend(query: Tokens, key: Keys, value: Keys, *, parallel_config: Any = None, **options: Any) -> Tokens:
    """diffusers' attention, or that of a sequence group where the processor carries one."""
    if isinstance(parallel_config, Ulysses):
        return parallel_config.attention(query, key, value, **options)
    return dispatch_attention_fn(query, key, value, parallel_config=parallel_config, **options)
