"""Noise levels of diffusers' FlowMatchEulerDiscreteScheduler, for families whose pipelines give it their own levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from jaxtyping import Float
from torch import Tensor

SHIFT_DEFAULTS = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def given_sigmas(levels: Sequence[float]) -> Float[Tensor, "points"]:
    """The noise levels at which steps start, then 0, as a schedule."""
    return torch.tensor([*levels, 0.0])


def at_levels(scheduler: Any, levels: Sequence[float]) -> Any:
    """The flow scheduler with these noise levels, whatever levels and number of steps a pipeline asks it for."""

    class AtLevels(type(scheduler)):  # type: ignore[misc]
        def set_timesteps(
            self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None
        ) -> None:
            super().set_timesteps(sigmas=list(levels), device=device)

    return AtLevels.from_config(scheduler.config)


def scheduled_sigmas(
    scheduler: Any, levels: Sequence[float], shift: float | None = None, mu: float | None = None
) -> Float[Tensor, "points"]:
    """The sigmas that diffusers' FlowMatchEulerDiscreteScheduler makes of a pipeline's `levels`, then 0.

    Args:
        scheduler: the folder's own.
        levels: evenly spaced; the scheduler shifts them and stretches them to its last level.
        shift: replaces the scheduler's, whatever the video's size.
        mu: the logarithm of the shift for this size of video, where the scheduler shifts by size.
    """
    fixed = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    copy = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **fixed)
    copy.set_timesteps(sigmas=list(levels), mu=mu)
    return torch.as_tensor(copy.sigmas, dtype=torch.float32, device="cpu")


def sigmas_by_size(
    scheduler: Any, num_steps: int, tokens: int, shift: float | None = None, **defaults: float
) -> Float[Tensor, "points"]:
    """`scheduled_sigmas` of even levels down to 1 / num_steps, as the pipelines of FLUX, Qwen-Image and LTX-Video do.

    Args:
        tokens: of a sample; the logarithm of the shift is linear in it.
        defaults: see `log_shift`.
    """
    levels = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
    return scheduled_sigmas(scheduler, levels, shift, log_shift(scheduler, tokens, **defaults))


def log_shift(scheduler: Any, tokens: int, **defaults: float) -> float:
    """The logarithm of the shift for this number of tokens.

    Args:
        defaults: of settings that the scheduler's config may lack, where they differ from `SHIFT_DEFAULTS`.
    """
    settings = [scheduler.config.get(name, value) for name, value in {**SHIFT_DEFAULTS, **defaults}.items()]
    return float(calculate_shift(tokens, *settings))
