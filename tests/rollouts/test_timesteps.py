"""Metrics per denoising step: means over the passes of all ranks, whatever steps each rank trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bpgo_video.config.bpgo import LossConfig
from bpgo_video.learner.losses import PolicyShift, ratio_metrics
from bpgo_video.rollouts.updates import BY_STEP, step_metrics, step_sums


def metrics(value: float) -> dict[str, Tensor]:
    return dict.fromkeys((*BY_STEP, "other"), torch.tensor(value))


def test_means_are_taken_over_the_passes_of_a_step_on_all_ranks() -> None:
    first = step_sums([(0, metrics(1.0)), (2, metrics(4.0)), (0, metrics(3.0))], num_steps=4)
    second = step_sums([(2, metrics(1.0))], num_steps=4)
    found = step_metrics(first + second)
    assert found["timestep/00/ratio_mean"] == 2.0
    assert found["timestep/02/ratio_mean"] == 2.5
    assert {key.split("/")[1] for key in found} == {"00", "02"}
    assert len(found) == 2 * (
        len(BY_STEP) + 1
    )  # the std and the effective sample size follow from the mean squared error


def test_the_std_of_ratios_is_over_all_samples_even_for_micro_batches_of_one() -> None:
    log_ratios = 1e-2 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    losses = [(1, ratio_metrics(PolicyShift(one[None].clone()), torch.ones(1), LossConfig())) for one in log_ratios]
    found, ratios = step_metrics(step_sums(losses, num_steps=2)), log_ratios.double().exp()
    assert found["timestep/01/ratio_std"] == pytest.approx(float(ratios.std(correction=0)), rel=1e-4)
    effective = ratios.sum() ** 2 / ratios.square().sum() / len(ratios)
    assert 1 - found["timestep/01/effective_samples"] == pytest.approx(1 - float(effective), rel=1e-3)
