"""Metrics by denoising step are means over all ranks' passes, whichever steps each rank trained."""

from __future__ import annotations

import torch
from torch import Tensor

from bpgo_video.rollouts.timesteps import BY_STEP, step_metrics, step_sums


def metrics(value: float) -> dict[str, Tensor]:
    return dict.fromkeys((*BY_STEP, "other"), torch.tensor(value))


def test_means_are_taken_over_the_passes_of_a_step_on_all_ranks() -> None:
    first = step_sums([(0, metrics(1.0)), (2, metrics(4.0)), (0, metrics(3.0))], num_steps=4)
    second = step_sums([(2, metrics(1.0))], num_steps=4)
    found = step_metrics(first + second)
    assert found["timestep/00/ratio_std"] == 2.0
    assert found["timestep/02/ratio_std"] == 2.5
    assert {key.split("/")[1] for key in found} == {"00", "02"}
    assert len(found) == 2 * len(BY_STEP)
