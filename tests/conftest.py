"""Fixtures for all tests: one thread, the shipped policy, its recipe."""

from __future__ import annotations

import pytest
import torch

from bpgo_video.config import Config
from bpgo_video.config_io import read_yaml
from bpgo_video.policies import Policy, load_policy
from tests.recipes import RECIPE

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def recipe() -> Config:
    return read_yaml(RECIPE)


@pytest.fixture(scope="session")
def policy(recipe: Config) -> Policy:
    """The embedded policy, whole, on this process."""
    return load_policy(recipe.policy.folder, max_sequence_length=recipe.policy.max_sequence_length)
