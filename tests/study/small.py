"""A study that runs in seconds, and small groups with an oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bpgo_video.study.preregistration import Surrogate, read_preregistration

YAML = """
surrogate:
  seeds: 3
  first_seed: 0
  equivalence: 2.0
  world: {steps: 4, prompts_per_step: 4, group_size: 4, frames: 3, prompts: 8, features: 6, latents: 3, sigma: 0.2,
          frame_std: 0.5, reference_samples: 4}
  tuning: {seeds: 2, first_seed: 1000, learning_rates: [0.01, 0.02]}
  regimes:
    clean: {}
    noisy: {noise: [0.5, 4.0]}
  arms:
    grpo: {}
    larger: {learning_rate: 2.0}
    agreement: {bpgo: {alpha: 0.5, zeta: 0, trust: reliability}, scorings: 2, trains_on: mean, rho: scorings}
  demands:
    - {arm: agreement, regimes: [clean], above: -0.001, below: 0.001}
    - {arm: agreement, regimes: [noisy], above: 1000.0}
signals:
  group_size: 4
  groups: 1
  noise: [0.1, 0.5]
  noise_draws: 3
  resamples: 50
  seed: 0
  demands: []
"""


def preregistration(folder: Path) -> Path:
    """A small pre-registration in a file."""
    path = folder / "small.yaml"
    path.write_text(YAML, "utf-8")
    return path


def plan(folder: Path) -> Surrogate:
    return read_preregistration(preregistration(folder)).surrogate


def registered(**changes: object) -> Surrogate:
    """The package's own pre-registration."""
    return replace(read_preregistration().surrogate, **changes)
