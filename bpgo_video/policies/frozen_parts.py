"""How do VAE and image encoder take less memory? In tiles, one video at a time, or on the CPU while others work."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from bpgo_video.config.bpgo import ConfigError, PolicyConfig


def save_memory(policy: Any, settings: PolicyConfig, device: torch.device) -> None:
    """Apply `vae_tiling`, `vae_slicing` and `frozen_rest_on` to a policy that has just been loaded.

    Args:
        device: where the parts work.

    Raises:
        ConfigError: the VAE cannot do it, or the policy has no diffusers pipeline whose parts could be moved.
    """
    if not (settings.vae_tiling or settings.vae_slicing or settings.frozen_rest_on == "cpu"):
        return
    pipeline = getattr(policy, "pipeline", None)
    if pipeline is None:
        raise ConfigError(
            "policy.vae_tiling, vae_slicing and frozen_rest_on act on a diffusers pipeline, and "
            f"{type(policy).__name__} has no attribute `pipeline`; leave them at their defaults"
        )
    if getattr(pipeline, "vae", None) is not None:
        in_parts(pipeline.vae, tiling=settings.vae_tiling, slicing=settings.vae_slicing)
    if settings.frozen_rest_on == "cpu":
        rest_on_cpu(policy, device)


def in_parts(vae: Any, *, tiling: bool, slicing: bool) -> None:
    """Let a VAE work tile by tile, video by video.

    Raises:
        ConfigError: its class does not.
    """
    for wanted, setting, method in (
        (tiling, "policy.vae_tiling", "enable_tiling"),
        (slicing, "policy.vae_slicing", "enable_slicing"),
    ):
        if not wanted:
            continue
        try:
            getattr(vae, method)()
        except (AttributeError, NotImplementedError) as error:
            raise ConfigError(
                f"{setting} is true, but {type(vae).__name__} cannot; set it to false, or take a smaller micro-batch"
            ) from error


def rest_on_cpu(policy: Any, device: torch.device) -> None:
    """From now on VAE and image encoder are on the device only while `decode` or `image_conditioning` runs."""
    parts = [
        part
        for name, part in policy.pipeline.components.items()
        if isinstance(part, nn.Module) and name.startswith(("vae", "image_encoder"))
    ]
    for part in parts:
        part.to("cpu")
    for name in ("decode", "image_conditioning"):
        setattr(policy, name, _with_parts(getattr(policy, name), parts, device))


def _with_parts(method: Callable[..., Any], parts: list[nn.Module], device: torch.device) -> Callable[..., Any]:
    @wraps(method)
    def at_work(*args: Any, **kwargs: Any) -> Any:
        for part in parts:
            part.to(device)
        try:
            return method(*args, **kwargs)
        finally:
            for part in parts:
                part.to("cpu")

    return at_work
