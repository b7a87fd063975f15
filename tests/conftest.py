"""Shared fixtures: one torch thread, the shipped policy and its recipe, and a restored attention backend."""

from __future__ import annotations

from collections.abc import Iterator

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


class ByFile(LoadScopeScheduling):
    """Distributes whole test files over the processes of `make test`; one process gets all that start ranks."""

    def _split_scope(self, nodeid: str) -> str:
        folder, _, _ = nodeid.partition("::")[0].rpartition("/")
        return folder if folder.endswith("distributed") else nodeid.partition("::")[0]


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
