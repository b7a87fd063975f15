"""With which kernels does a transformer compute? Attention by one of diffusers' backends, blocks perhaps compiled."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.policies.sequence import PLANS
from bpgo_video.policies.transformers import Transformers

INFERENCE_ONLY = "sage"  # its kernels have no backward


def choose_attention(transformers: Transformers, backend: str | None, *, trains: bool = True) -> None:
    """Let attention be computed by a backend, in rollout and replay alike; None leaves diffusers' own choice.

    Raises:
        ConfigError: see `check_backend`; or the backend is not installed, or a transformer's attention does not go
            through diffusers' dispatch.
    """
    check_backend(backend, trains=trains)
    if backend is not None:
        for transformer in transformers.values():
            _choose(transformer, backend)


def check_backend(backend: str | None, *, trains: bool) -> None:
    """Whether a name is one that can be looked for.

    Raises:
        ConfigError: diffusers does not know it, or it has no gradient and is to train.
    """
    known = sorted(name.value for name in AttentionBackendName)
    if backend is not None and backend not in known:
        raise ConfigError(f"policy.attention_backend is {backend!r}; diffusers knows {known}")
    if trains and backend is not None and INFERENCE_ONLY in backend:
        raise ConfigError(
            f"policy.attention_backend is {backend!r}, which has no backward and cannot train; take `flash` or `native`"
        )


def _choose(transformer: Any, backend: str) -> None:
    if plan := PLANS.get(type(transformer).__name__):
        plan.attention(transformer)  # diffusers' own processors for some do not go through its dispatcher
    processors = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ConfigError(
            f"policy.attention_backend is {backend!r}, but the attention of {type(transformer).__name__} has torch's "
            "scaled_dot_product_attention written in; set it to null"
        )
    try:
        transformer.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"policy.attention_backend {backend!r} cannot be used here: {error}; `native` needs no package"
        ) from error


def compile_blocks(transformer: nn.Module, block_classes: tuple[type, ...]) -> None:
    """Compile each repeated block, adapters and checkpointing included; blocks of a class share their code.

    Roundings to bf16 between operations are kept as they stand in the model: rollout and replay are compiled as two
    programs, and only so do they agree.
    """
    for part in transformer.modules():
        if isinstance(part, block_classes):
            part.compile(options={"emulate_precision_casts": True})
