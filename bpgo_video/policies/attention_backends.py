"""The kernels that compute attention: chosen by diffusers' names, and tried before a run.

A backend is tried on random queries, keys and values of a transformer's heads, forward and backward: some are
installed but have no gradient (`_flash_3` of diffusers 0.42), take no mask, or give NaN gradients with one (cuDNN on
H100, pytorch #196678). A run would notice only after its first rollout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.policies.attention import SequencePlan, declared_heads
from bpgo_video.policies.base import Policy
from bpgo_video.policies.networks import Transformers

KEY = "policy.attention_backend"  # of a recipe
ODE_KEY = "rollout.attention_backend"
INFERENCE_ONLY = "sage"  # its kernels have no backward
TRIED_TOKENS = 64
HEAD_DIM = 64  # where a transformer's config states none


def check_backend(backend: str | None, *, trains: bool, key: str = KEY) -> None:
    """Check the name of an attention backend; None is diffusers' own choice.

    Raises:
        ConfigError: diffusers does not know it, or it has no gradient and the policy trains.
    """
    known = sorted(name.value for name in AttentionBackendName)
    if backend is not None and backend not in known:
        raise ConfigError(f"{key} is {backend!r}; diffusers knows {known}")
    if trains and backend is not None and INFERENCE_ONLY in backend:
        raise ConfigError(f"{key} is {backend!r}, which has no backward and cannot train; take `flash` or `native`")


def choose_attention(
    transformers: Transformers, backend: str | None, plan: SequencePlan | None = None, *, trains: bool = True
) -> None:
    """Compute attention with a backend, in rollout and replay alike; None leaves diffusers' own choice.

    Args:
        plan: of the transformers' family; its `attention` replaces processors that bypass diffusers' dispatcher.

    Raises:
        ConfigError: see `check_backend`; or the backend is not installed, or a transformer's attention does not go
            through diffusers' dispatcher.
    """
    check_backend(backend, trains=trains)
    if backend is None:
        return
    for transformer in transformers.values():
        if plan is not None:
            plan.attention(transformer)
        processors = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise ConfigError(
                f"policy.attention_backend is {backend!r}, but {type(transformer).__name__} calls torch's "
                "scaled_dot_product_attention directly; set it to null"
            )
        try:
            transformer.set_attention_backend(backend)  # type: ignore[operator]
        except (ImportError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"policy.attention_backend {backend!r} cannot be used here: {error}; `native` needs no package"
            ) from error


def set_up_attention(
    policy: Policy, backend: str | None, of_ode: str | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Choose the backend of a policy that trains, and try it; try that of its ODE steps, see `with_backend`.

    Raises:
        ConfigError: see `choose_attention` and `try_attention`.
    """
    # `native` is the default; to name it replaces processors that bypass the dispatcher.
    choose_attention(policy.transformers, backend or (of_ode and "native"), policy.sequence_plan)
    try_attention(policy, backend, dtype, device)
    if of_ode is not None:
        try_attention(policy, of_ode, dtype, device, trains=False)


@contextmanager
def with_backend(transformers: Any, backend: str | None) -> Iterator[None]:
    """Attention through diffusers' dispatcher uses this backend inside the block; None changes nothing."""
    modules = transformers.modules() if backend is not None else ()
    processors: list[Any] = [getattr(module, "processor", None) for module in modules]
    before = [(one, one._attention_backend) for one in processors if hasattr(one, "_attention_backend")]
    try:
        for processor, _ in before:
            processor._attention_backend = AttentionBackendName(backend)
        yield
    finally:
        for processor, chosen in before:
            processor._attention_backend = chosen


def takes_masks(policy: Policy) -> bool:
    """Whether padding of texts is masked; False for a family that does not state the shapes of its conditioning."""
    try:
        return any("mask" in name for name in policy.text_shapes(1))
    except NotImplementedError:
        return False


def try_attention(
    policy: Policy, backend: str | None, dtype: torch.dtype, device: torch.device, *, trains: bool = True
) -> None:
    """Compute attention of the policy's heads once with a backend; None is torch's choice.

    Args:
        dtype: that the transformers compute in.
        trains: also compute gradients.

    Raises:
        ConfigError: the backend raises, or a result or a gradient is not finite.
    """
    config, plan = policy.transformer_config, policy.sequence_plan
    heads = plan.heads(config) if plan else declared_heads(config)
    masked = takes_masks(policy)
    shape, generator = (3, 1, TRIED_TOKENS, heads, config.get("attention_head_dim", HEAD_DIM)), torch.Generator()
    random = torch.randn(shape, generator=generator.manual_seed(0)).to(device, dtype)
    query, key, value = inputs = [tensor.requires_grad_(trains) for tensor in random.unbind()]
    mask = torch.ones(1, 1, 1, TRIED_TOKENS, dtype=torch.bool, device=device)
    mask[..., TRIED_TOKENS // 2 :] = False
    name = AttentionBackendName(backend) if backend else None
    named = f"{KEY if trains else ODE_KEY} {backend!r}" if backend else "torch's attention"
    try:
        output = dispatch_attention_fn(query, key, value, attn_mask=mask if masked else None, backend=name)
        if trains:
            output.square().sum().backward()
    except Exception as error:
        work = f"{'with a mask, ' if masked else ''}{'forward and backward' if trains else 'forward'}"
        raise ConfigError(
            f"{named} fails ({work}, {dtype}, {heads} heads of {shape[-1]} channels): {error}; set it to `native` or "
            "`_native_efficient`"
        ) from error
    results = [output, *(tensor.grad for tensor in inputs if tensor.grad is not None)]
    if not all(bool(result.isfinite().all()) for result in results):
        raise ConfigError(
            f"{named} gives results or gradients that are not finite on {device} in {dtype}; set it to "
            "`_native_efficient` or `_native_math`"
        )
