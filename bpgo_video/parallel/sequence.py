"""Where does a transformer part its tokens, and where do they come together again?

A plan per transformer class: tokens are split where they enter the first block, with their rotary embeddings, and
joined behind the output projection; in between every rank computes on its own part, and self-attention is `ulysses.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bpgo_video.config import ConfigError
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.parallel.ulysses import Ulysses, attend


@dataclass(frozen=True)
class SequencePlan:
    """Names of a transformer's parts.

    Attributes:
        blocks: its lists of blocks, in order; the first argument of the very first block is `hidden_states`.
        rope: the module whose outputs are rotary embeddings, a row per token along `rope_dim`.
        head: the last module that works on tokens.
        times: the module that embeds timesteps, where every token may have its own: [samples x tokens] and, as the
            keyword `timestep_seq_len`, how many tokens.
        text_first: whether text tokens stand before the video's in joint attention.
    """

    blocks: tuple[str, ...]
    rope: str
    rope_dim: int
    head: str
    times: str | None = None
    text_first: bool = False


PLANS = {
    "WanTransformer3DModel": SequencePlan(
        blocks=("blocks",), rope="rope", rope_dim=1, head="proj_out", times="condition_embedder"
    ),
    "HunyuanVideoTransformer3DModel": SequencePlan(
        blocks=("transformer_blocks", "single_transformer_blocks"), rope="rope", rope_dim=0, head="proj_out"
    ),
}


def check_heads(transformer_config: Mapping[str, Any], sequence: int) -> None:
    """Whether a sequence group can share the heads, from the transformer's config.json.

    Raises:
        ConfigError: the heads do not divide, or there is no plan for the class; the message names what works.
    """
    if sequence == 1:
        return
    name, heads = transformer_config["_class_name"], transformer_config["num_attention_heads"]
    if name not in PLANS:
        raise ConfigError(
            f"parallel.sequence is {sequence}, but {name} cannot be split; {sorted(PLANS)} can. Set it to 1"
        )
    if heads % sequence:
        valid = [size for size in range(1, heads + 1) if heads % size == 0]
        raise ConfigError(
            f"parallel.sequence is {sequence}, but this policy's {heads} attention heads are shared out whole; it can "
            f"be one of {valid}"
        )


def parallelise(transformer: nn.Module, mesh: Mesh) -> None:
    """Let the ranks of a sequence group share each sample's tokens in every forward from now on.

    Called once adapters are in and before the engine takes the module; a mesh without sequence groups changes nothing.
    """
    if mesh.sequence_group is None:
        return
    plan = PLANS[type(transformer).__name__]
    ulysses = Ulysses(mesh.sequence_group, plan.text_first)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_states, *others = (kwargs.pop("hidden_states"),) if "hidden_states" in kwargs else args
        ulysses.tokens = hidden_states.shape[1]
        return (ulysses.split(hidden_states, 1), *others), kwargs

    def split_rope(_: nn.Module, __: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(ulysses.split(part, plan.rope_dim) for part in output)

    def split_times(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = kwargs["timestep_seq_len"]
        if tokens is None:
            return args, kwargs
        own = ulysses.split(args[0].unflatten(0, (-1, tokens)), 1)
        return (own.flatten(), *args[1:]), {**kwargs, "timestep_seq_len": own.shape[1]}

    def join(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return ulysses.join(output, 1)

    lists = [transformer.get_submodule(name) for name in plan.blocks]
    transformer.get_submodule(f"{plan.blocks[0]}.0").register_forward_pre_hook(enter, with_kwargs=True)
    transformer.get_submodule(plan.rope).register_forward_hook(split_rope)
    if plan.times is not None:
        transformer.get_submodule(plan.times).register_forward_pre_hook(split_times, with_kwargs=True)
    transformer.get_submodule(plan.head).register_forward_hook(join)
    # The class's module looks `dispatch_attention_fn` up at every call; processors hand it their `_parallel_config`.
    sys.modules[type(transformer).__module__].dispatch_attention_fn = attend  # type: ignore[attr-defined]
    for module in (module for blocks in lists for module in blocks.modules()):
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = ulysses  # type: ignore[union-attr]
