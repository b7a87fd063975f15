"""Where does a transformer part its tokens, and where do they come together again?

A plan per transformer class, or the family's own: tokens are split where they enter the first block, with their rotary
embeddings, and joined behind the output projection; in between every rank computes on its own part, and self-attention
is `ulysses.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.ulysses import Ulysses, attend
from bpgo_video.policies import cogvideox_attention, hunyuan15_attention, mochi_attention


def rope_module(name: str, dim: int, transformer: nn.Module, ulysses: Ulysses) -> None:
    """Split what the module `name` gives: rotary embeddings, a row per token along `dim`."""

    def split(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(ulysses.split(part, dim) for part in output)

    transformer.get_submodule(name).register_forward_hook(split)


def rope_argument(name: str, dim: int, transformer: nn.Module, ulysses: Ulysses) -> None:
    """Split what the transformer is called with as `name`: rotary embeddings, or None."""

    def split(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        parts = kwargs[name] and tuple(ulysses.split(part, dim) for part in kwargs[name])
        return args, {**kwargs, name: parts}

    transformer.register_forward_pre_hook(split, with_kwargs=True)


def count_held(place: int, ulysses: Ulysses, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A block's arguments with the number of first tokens at `place` as it is on this rank."""
    return (*args[:place], ulysses.held(args[place]), *args[place + 1 :])


def rope_grid(name: str, transformer: nn.Module, ulysses: Ulysses) -> None:
    """Split what the module `name` gives: rotary embeddings by frame, row and column, which are flattened behind it."""

    def split(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return ulysses.split(output.flatten(1, 3), 1)[:, :, None, None]

    transformer.get_submodule(name).register_forward_hook(split)


def declared_heads(config: Mapping[str, Any]) -> int:
    """The number of attention heads in a transformer's config."""
    return int(config["num_attention_heads"])


def heads_by_width(config: Mapping[str, Any]) -> int:
    """The same where a head is as wide as its rotary embeddings."""
    return int(config["model_dim"]) // sum(config["axes_dims"])


def dispatches(transformer: nn.Module) -> None:
    """diffusers' own processors go through its dispatcher: nothing is to be done."""


@dataclass(frozen=True)
class SequencePlan:
    """Names of a transformer's parts.

    Attributes:
        blocks: its lists of blocks, in order; the first argument of the very first block is `hidden_states`.
        rope: lets rotary embeddings be split, which come with every token.
        head: the last module that works on tokens; None where that is the last block.
        text_first: whether text tokens stand before the video's in joint attention.
        attention: puts processors in place that go through diffusers' dispatcher.
        cross_attention: the name, within a block, of attention to text alone: every rank computes it on its own tokens.
        per_token: inputs of the transformer that may have an entry for each token, along dim 1.
        first_tokens: the place among a block's arguments of how many of the video's first tokens are given ones.
        heads: how many attention heads a config has.
    """

    blocks: tuple[str, ...]
    rope: Callable[[nn.Module, Ulysses], None]
    head: str | None
    text_first: bool = False
    attention: Callable[[nn.Module], None] = dispatches
    cross_attention: str | None = None
    per_token: tuple[str, ...] = ()
    first_tokens: int | None = None
    heads: Callable[[Mapping[str, Any]], int] = declared_heads


PLANS = {
    "WanTransformer3DModel": SequencePlan(
        blocks=("blocks",), rope=partial(rope_module, "rope", 1), head="proj_out", per_token=("timestep",)
    ),
    "HunyuanVideoTransformer3DModel": SequencePlan(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        rope=partial(rope_module, "rope", 0),
        head="proj_out",
        first_tokens=6,
    ),
    "HunyuanVideo15Transformer3DModel": SequencePlan(
        blocks=("transformer_blocks",),
        rope=partial(rope_module, "rope", 0),
        head="proj_out",
        attention=hunyuan15_attention.dispatch,
    ),
    "CogVideoXTransformer3DModel": SequencePlan(
        blocks=("transformer_blocks",),
        rope=partial(rope_argument, "image_rotary_emb", 0),
        head="proj_out",
        text_first=True,
        attention=cogvideox_attention.dispatch,
    ),
    "MochiTransformer3DModel": SequencePlan(
        blocks=("transformer_blocks",),
        rope=partial(rope_module, "rope", 0),
        head="proj_out",
        attention=mochi_attention.dispatch,
    ),
    "LTXVideoTransformer3DModel": SequencePlan(
        blocks=("transformer_blocks",),
        rope=partial(rope_module, "rope", 1),
        head="proj_out",
        cross_attention="attn2",
        per_token=("timestep",),
    ),
    "Kandinsky5Transformer3DModel": SequencePlan(
        blocks=("visual_transformer_blocks",),
        rope=partial(rope_grid, "visual_rope_embeddings"),
        head=None,
        cross_attention="cross_attention",
        heads=heads_by_width,
    ),
}


def check_heads(transformer_config: Mapping[str, Any], sequence: int, own: SequencePlan | None = None) -> None:
    """Whether a sequence group can share the heads, from the transformer's config.json.

    Args:
        own: the family's plan, where it brings one.

    Raises:
        ConfigError: the heads do not divide, or there is no plan for the class; the message names what works.
    """
    if sequence == 1:
        return
    name = transformer_config["_class_name"]
    plan = own or PLANS.get(name)
    if plan is None:
        raise ConfigError(
            f"parallel.sequence is {sequence}, but {name} cannot be split; {sorted(PLANS)} can. Set it to 1, or give "
            "the family's class a sequence_plan (docs/new_family.md)"
        )
    heads = plan.heads(transformer_config)
    if heads % sequence:
        valid = [size for size in range(1, heads + 1) if heads % size == 0]
        raise ConfigError(
            f"parallel.sequence is {sequence}, but this policy's {heads} attention heads are shared out whole; it can "
            f"be one of {valid}"
        )


def parallelise(transformer: nn.Module, mesh: Mesh, own: SequencePlan | None = None) -> None:
    """Let the ranks of a sequence group share each sample's tokens in every forward from now on.

    Called once adapters are in and before the engine takes the module; a mesh without sequence groups changes nothing.

    Args:
        own: the family's plan, where it brings one.

    Raises:
        ConfigError: no attention would look beyond a rank's own tokens.
    """
    if mesh.sequence_group is None:
        return
    plan = own or PLANS[type(transformer).__name__]
    ulysses = Ulysses(mesh.sequence_group, plan.text_first)

    def split_inputs(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        own = {name: ulysses.split(kwargs[name], 1) for name in plan.per_token if kwargs[name].ndim > 1}
        return args, {**kwargs, **own}

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_states, *others = (kwargs.pop("hidden_states"),) if "hidden_states" in kwargs else args
        ulysses.tokens = hidden_states.shape[1]
        return (ulysses.split(hidden_states, 1), *others), kwargs

    def join(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return ulysses.join(output, 1)

    plan.attention(transformer)
    transformer.register_forward_pre_hook(split_inputs, with_kwargs=True)
    transformer.get_submodule(f"{plan.blocks[0]}.0").register_forward_pre_hook(enter, with_kwargs=True)
    if plan.first_tokens is not None:
        for block in (one for name in plan.blocks for one in transformer.get_submodule(name).children()):
            block.register_forward_pre_hook(partial(count_held, plan.first_tokens, ulysses))  # behind `enter`
    plan.rope(transformer, ulysses)
    last = plan.head or f"{plan.blocks[-1]}.{len(transformer.get_submodule(plan.blocks[-1])) - 1}"  # type: ignore[arg-type]
    transformer.get_submodule(last).register_forward_hook(join)
    # The class's module looks `dispatch_attention_fn` up at every call; processors hand it their `_parallel_config`.
    sys.modules[type(transformer).__module__].dispatch_attention_fn = attend  # type: ignore[attr-defined]
    for processor in _processors(transformer, plan):
        processor._parallel_config = ulysses


def _processors(transformer: nn.Module, plan: SequencePlan) -> list[Any]:
    """Of the blocks' attention to all tokens."""
    named = [part for name in plan.blocks for part in transformer.get_submodule(name).named_modules()]
    crossing = f".{plan.cross_attention}"
    attending = [module for name, module in named if not name.endswith(crossing)]
    found = [
        module.processor for module in attending if hasattr(getattr(module, "processor", None), "_parallel_config")
    ]
    if not found:
        raise ConfigError(
            f"the attention of {type(transformer).__name__} in {list(plan.blocks)} does not go through diffusers' "
            "dispatcher, so that ranks cannot share tokens; give its SequencePlan an `attention`, or set "
            "parallel.sequence to 1"
        )
    return found
