"""Shared fixtures: one torch thread, the shipped policy and its recipe, and a restored attention backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from bpgo_video.config.bpgo import Config
from bpgo_video.config.reading import read_yaml
from bpgo_video.policies import Policy, load_policy
from tests.made.recipes import RECIPE

torch.set_num_threads(1)
hypothesis.settings.register_profile("any machine", deadline=None)  # a loaded core is no failure
hypothesis.settings.load_profile("any machine")


# Files of tests/distributed whose tests read the results of one launch.
SHARING = {"test_agreement", "test_ema", "test_precision", "test_sequence", "test_tools", "test_training"}


class ByFile(LoadScopeScheduling):
    """Distributes whole test files over the processes of `make test`; one process gets all that share a launch."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ranks" if "/distributed/" in file and Path(file).stem in SHARING else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def recipe() -> Config:
    return read_yaml(RECIPE)


@pytest.fixture(scope="session")
def policy(recipe: Config) -> Policy:
    """The embedded policy, unsharded, in this process."""
    return load_policy(recipe.policy.folder, max_sequence_length=recipe.policy.max_sequence_length)


@pytest.fixture(autouse=True)
def restore_backend() -> Iterator[None]:
    """Restore the attention backend after each test: diffusers keeps one for the whole process."""
    with attention_backend("native"):
        yield
