"""At which noise level does the policy move? The losses' metrics by denoising step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.losses import RATIO_ERROR, with_spread

# Means over samples; the first is also the noise floor where nothing has moved yet: 0 in an exact replay.
BY_STEP = (
    "log_ratio_abs_max",
    "ratio_mean",
    RATIO_ERROR,
    "clip_fraction/positive",
    "clip_fraction/negative",
)


def step_sums(losses: Iterable[tuple[int, Mapping[str, Tensor]]], num_steps: int) -> Float[Tensor, "steps columns"]:
    """Sums of BY_STEP over passes, then their number: what ranks add up, whichever steps each of them trained."""
    sums = torch.zeros(num_steps, len(BY_STEP) + 1, dtype=torch.float64)
    for index, metrics in losses:
        sums[index, :-1] += torch.stack([metrics[name].double().cpu() for name in BY_STEP])
        sums[index, -1] += 1
    return sums


def step_metrics(sums: Float[Tensor, "steps columns"]) -> dict[str, float]:
    """`timestep/INDEX/NAME`, means over the passes of all ranks; steps that none has trained are left out."""
    found: dict[str, float] = {}
    for index in sums[:, -1].nonzero().flatten().tolist():
        means = dict(zip(BY_STEP, (sums[index, :-1] / sums[index, -1]).tolist(), strict=True))
        found |= {f"timestep/{index:02d}/{name}": value for name, value in with_spread(means).items()}
    return found
