"""Which noise levels does diffusers' FlowMatchEulerDiscreteScheduler make of those that a pipeline hands it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor


def scheduled_sigmas(
    scheduler: Any, levels: Sequence[float], shift: float | None = None, mu: float | None = None
) -> Float[Tensor, "points"]:
    """The pipeline's evenly spaced `levels` as the scheduler shifts them and stretches them to its last one, then 0.

    Args:
        scheduler: the folder's own.
        shift: in place of the scheduler's, sigma' = shift sigma / (1 + (shift - 1) sigma), whatever the video's size.
        mu: the logarithm of the shift for a video of this size, where the scheduler shifts by size.
    """
    asked = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    own = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **asked)
    own.set_timesteps(sigmas=list(levels), mu=mu)
    return torch.as_tensor(own.sigmas, dtype=torch.float32, device="cpu")
