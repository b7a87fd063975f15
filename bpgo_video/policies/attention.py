"""Attention of a transformer: a mask of keys for padded text, and the tokens of a sequence group.

*Masks.* diffusers' own processors remove padding sample by sample (Mochi) or mask all pairs of tokens (HunyuanVideo
1.5), which takes gigabytes for a video of a few seconds. Padding need not be masked as queries, since nothing reads its
output.

*Sequence groups.* Every rank of a group computes a part of each video's tokens. Tokens and their rotary embeddings are
split before the first block and joined after the output projection. In between, `distributed/ulysses.py` exchanges
tokens for heads in self-attention. A family's `sequence_plan` names the modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.ulysses import Ulysses, attend

Rotary = tuple[Tensor, Tensor]  # cosines and sines, a row for each of the video's tokens
Rotate = Callable[[Float[Tensor, "samples tokens heads head_dim"], Rotary], Tensor]


@dataclass
class Processor:
    """A processor of diffusers' attention that goes through its dispatcher."""

    _attention_backend: Any = field(default=None, kw_only=True)  # set by diffusers' `set_attention_backend`
    _parallel_config: Any = field(default=None, kw_only=True)  # set by `parallelise`

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The attention's output before its last layers, [samples, tokens, dim]."""
        output = attend(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return output.flatten(2)

    def all_tokens(self, local: int) -> int:
        """The video's tokens on all ranks of a sequence group, given those of this rank."""
        return self._parallel_config.tokens if isinstance(self._parallel_config, Ulysses) else local


@dataclass
class JointAttention(Processor):
    """Joint attention of the video's tokens, which come first and are rotated, and of text tokens.

    Attributes:
        rotate: turns queries and keys by their positions.
    """

    rotate: Rotate

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "samples tokens dim"],
        encoder_hidden_states: Float[Tensor, "samples text text_dim"],
        attention_mask: Bool[Tensor, "samples text"] | Int[Tensor, "samples text"],
        image_rotary_emb: Rotary,
    ) -> tuple[Tensor, Tensor]:
        """The attention's output for video and text tokens."""
        query, key, value = of_video(attn, hidden_states)
        video = [self.rotate(query, image_rotary_emb), self.rotate(key, image_rotary_emb), value]
        local = hidden_states.shape[1]
        mask = F.pad(attention_mask.bool(), (self.all_tokens(local), 0), value=True)[:, None, None]
        pairs = zip(video, of_text(attn, encoder_hidden_states), strict=True)
        output = self.attend(*(torch.cat(pair, dim=1) for pair in pairs), mask=mask)
        return projected(attn, output[:, :local], output[:, local:])


def by_head(attn: Any, x: Tensor, *layers: nn.Module) -> list[Tensor]:
    return [layer(x).unflatten(2, (attn.heads, -1)) for layer in layers]


def normalised(attn: Any, names: str, heads: list[Tensor]) -> list[Tensor]:
    """Queries and keys after the norms whose names begin with `names`, where the model has them; and values."""
    query, key, value = heads
    norms = (getattr(attn, names + part, None) for part in "qk")
    return [*(x if norm is None else norm(x) for norm, x in zip(norms, (query, key), strict=True)), value]


def of_video(attn: Any, video: Float[Tensor, "samples tokens dim"]) -> list[Tensor]:
    """Queries, keys and values of the video's tokens by head, before they are rotated."""
    return normalised(attn, "norm_", by_head(attn, video, attn.to_q, attn.to_k, attn.to_v))


def of_text(attn: Any, text: Float[Tensor, "samples text text_dim"]) -> list[Tensor]:
    """Queries, keys and values of text tokens by head."""
    return normalised(attn, "norm_added_", by_head(attn, text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))


def projected(attn: Any, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The attention's output after its last layers; a last block may have none for text."""
    for layer in attn.to_out:
        video = layer(video)
    last = getattr(attn, "to_add_out", None)
    return video, text if last is None else last(text)


def replace_processors(transformer: Any, *, attention: str, processor: Callable[..., Processor]) -> None:
    """Give each block's `attention` a new processor, with the backend that was chosen for the old one."""
    for block in transformer.transformer_blocks:
        module = getattr(block, attention)
        if module is None:  # SD3's second attention, which not every block has
            continue
        backend = getattr(module.processor, "_attention_backend", None)
        module.processor = processor(_attention_backend=backend)


SplitRope = Callable[[nn.Module, Ulysses], None]


def split_rope(name: str, dim: int) -> SplitRope:
    """Split the output of the transformer's module `name`: rotary embeddings, a tuple with a row per token on `dim`."""

    def register(transformer: nn.Module, ulysses: Ulysses) -> None:
        def split(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(ulysses.split(part, dim) for part in output)

        transformer.get_submodule(name).register_forward_hook(split)

    return register


def split_argument(name: str, dim: int) -> SplitRope:
    """Split the transformer's argument `name`: tensors with a row per token on `dim`, or None."""

    def register(transformer: nn.Module, ulysses: Ulysses) -> None:
        def split(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, name: tree_map_only(Tensor, lambda part: ulysses.split(part, dim), kwargs[name])}

        transformer.register_forward_pre_hook(split, with_kwargs=True)

    return register


def declared_heads(config: Mapping[str, Any]) -> int:
    """The number of attention heads in a transformer's config."""
    return int(config["num_attention_heads"])


def keep_processors(transformer: nn.Module) -> None:
    """Nothing to replace: diffusers' own processors go through its dispatcher."""


@dataclass(frozen=True)
class SequencePlan:
    """The modules of a transformer at which its tokens are split and joined.

    Attributes:
        blocks: names of its lists of blocks, in order; the first argument of the first block is `hidden_states`.
        rope: registers hooks that split whatever else has an entry per token, most often rotary embeddings.
        head: the last module that computes on single tokens; None if that is the last block.
        text_first: text tokens come before the video's in joint attention.
        attention: replaces attention processors that bypass diffusers' dispatcher.
        local_attention: the names, within a block, of attention that each rank computes for its own tokens, most
            often that to text.
        heads: the number of attention heads, given the transformer's config.
    """

    blocks: tuple[str, ...]
    rope: SplitRope
    head: str | None
    text_first: bool = False
    attention: Callable[[nn.Module], None] = keep_processors
    local_attention: tuple[str, ...] = ()
    heads: Callable[[Mapping[str, Any]], int] = declared_heads


def check_heads(transformer_config: Mapping[str, Any], sequence: int, plan: SequencePlan | None) -> None:
    """Check from the transformer's config.json that a sequence group can divide its attention heads.

    Raises:
        ConfigError: the number of heads is no multiple of `sequence`, or the family has no plan.
    """
    if sequence == 1:
        return
    if plan is None:
        raise ConfigError(
            f"parallel.sequence is {sequence}, but {transformer_config['_class_name']} cannot be split: its family has "
            "no sequence_plan. Set parallel.sequence to 1, or write a plan (docs/new_family.md)"
        )
    heads = plan.heads(transformer_config)
    if heads % sequence:
        valid = [size for size in range(1, heads + 1) if heads % size == 0]
        raise ConfigError(
            f"parallel.sequence is {sequence}, which does not divide this policy's {heads} attention heads; set it to "
            f"one of {valid}"
        )


def parallelise(transformer: nn.Module, mesh: Mesh, plan: SequencePlan | None) -> None:
    """Register hooks so that the ranks of a sequence group share each sample's tokens in every forward.

    Call it after adapters are added and before the engine takes the module. Without sequence groups nothing changes.
    `check_heads` must have accepted the plan.

    Raises:
        ConfigError: no attention of the transformer would see the tokens of other ranks.
    """
    if mesh.sequence_group is None:
        return
    assert plan is not None
    ulysses = Ulysses(mesh.sequence_group, plan.text_first)

    def split_timestep(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        timestep = kwargs["timestep"]  # one for each sample, or for each token
        return args, {**kwargs, "timestep": ulysses.split(timestep, 1)} if timestep.ndim > 1 else kwargs

    def split(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_states, *others = (kwargs.pop("hidden_states"),) if "hidden_states" in kwargs else args
        ulysses.tokens = hidden_states.shape[1]
        return (ulysses.split(hidden_states, 1), *others), kwargs

    def join(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return ulysses.join(output, 1)

    plan.attention(transformer)
    transformer.register_forward_pre_hook(split_timestep, with_kwargs=True)
    blocks = [block for name in plan.blocks for block in transformer.get_submodule(name).children()]
    blocks[0].register_forward_pre_hook(split, with_kwargs=True)
    plan.rope(transformer, ulysses)
    (transformer.get_submodule(plan.head) if plan.head else blocks[-1]).register_forward_hook(join)
    for processor in _processors(transformer, plan):
        module: Any = sys.modules[type(processor).__module__]
        if module.__name__.startswith("diffusers."):  # they look it up there, and pass it their _parallel_config
            module.dispatch_attention_fn = attend
        processor._parallel_config = ulysses


def _processors(transformer: nn.Module, plan: SequencePlan) -> list[Any]:
    """The processors of the blocks' attention among all tokens."""
    named = [part for name in plan.blocks for part in transformer.get_submodule(name).named_modules()]
    local = tuple(f".{name}" for name in plan.local_attention)
    attentions = [module for name, module in named if not name.endswith(local)]
    processors = [getattr(module, "processor", None) for module in attentions]
    parallel = [processor for processor in processors if hasattr(processor, "_parallel_config")]
    if not parallel:
        raise ConfigError(
            f"the attention of {type(transformer).__name__} in {list(plan.blocks)} bypasses diffusers' dispatcher, so "
            "its ranks cannot share tokens; give its SequencePlan an `attention`, or set parallel.sequence to 1"
        )
    return parallel
