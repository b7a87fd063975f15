"""How a policy's networks run: attention backend, compiled blocks, VAE in tiles or slices, idle networks on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from bpgo_video.config.bpgo import ConfigError, PolicyConfig
from bpgo_video.policies.networks import Transformers
from bpgo_video.policies.sequence import SequencePlan

INFERENCE_ONLY = "sage"  # its kernels have no backward


def check_backend(backend: str | None, *, trains: bool) -> None:
    """Check the name of an attention backend; None is diffusers' own choice.

    Raises:
        ConfigError: diffusers does not know it, or it has no gradient and the policy trains.
    """
    known = sorted(name.value for name in AttentionBackendName)
    if backend is not None and backend not in known:
        raise ConfigError(f"policy.attention_backend is {backend!r}; diffusers knows {known}")
    if trains and backend is not None and INFERENCE_ONLY in backend:
        raise ConfigError(
            f"policy.attention_backend is {backend!r}, which has no backward and cannot train; take `flash` or `native`"
        )


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


def compile_blocks(transformer: nn.Module, block_classes: tuple[type, ...]) -> None:
    """Compile each repeated block with its adapters and checkpointing; blocks of one class share their code.

    `emulate_precision_casts` keeps the model's own roundings to bf16 between operations. Rollout and replay are
    compiled as two programs, which agree bit by bit only with these roundings.
    """
    for part in transformer.modules():
        if isinstance(part, block_classes):
            part.compile(options={"emulate_precision_casts": True})


def save_memory(policy: Any, settings: PolicyConfig, device: torch.device) -> None:
    """Apply `vae_tiling`, `vae_slicing` and `frozen_rest_on` to a policy that has just been loaded.

    Args:
        device: where VAE and image encoder compute.

    Raises:
        ConfigError: the VAE does not support it.
    """
    if policy.pipeline.vae is not None:
        split_vae_work(policy.pipeline.vae, tiling=settings.vae_tiling, slicing=settings.vae_slicing)
    if settings.frozen_rest_on == "cpu":
        _rest_on_cpu(policy, device)


def split_vae_work(vae: Any, *, tiling: bool, slicing: bool) -> None:
    """Let a VAE compute tile by tile, or one video at a time.

    Raises:
        ConfigError: its class does not support it.
    """
    for enabled, name in ((tiling, "tiling"), (slicing, "slicing")):
        if not enabled:
            continue
        try:
            getattr(vae, f"enable_{name}")()
        except (AttributeError, NotImplementedError) as error:
            raise ConfigError(
                f"policy.vae_{name} is true, but {type(vae).__name__} does not support it; set it to false, or take a "
                "smaller micro-batch"
            ) from error


def _rest_on_cpu(policy: Any, device: torch.device) -> None:
    """Keep VAE and image encoder on the CPU except while `decode` or `image_conditioning` runs."""
    networks = [
        part
        for name, part in policy.pipeline.components.items()
        if isinstance(part, nn.Module) and name.startswith(("vae", "image_encoder"))
    ]
    for network in networks:
        network.to("cpu")
    for name in ("decode", "image_conditioning"):
        setattr(policy, name, _on_device(getattr(policy, name), networks, device))


def _on_device(method: Callable[..., Any], networks: list[nn.Module], device: torch.device) -> Callable[..., Any]:
    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        for network in networks:
            network.to(device)
        try:
            return method(*args, **kwargs)
        finally:
            for network in networks:
                network.to("cpu")

    return run
