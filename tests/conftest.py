"""Fixtures for all tests: one thread, the shipped policy, its recipe, and attention as it was."""

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
    """Processes that share the tests (`make test`) take whole files, and one of them all that start ranks."""

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
    """The embedded policy, whole, on this process."""
    return load_policy(recipe.policy.folder, max_sequence_length=recipe.policy.max_sequence_length)


@pytest.fixture(autouse=True)
def own_backend() -> Iterator[None]:
    """A transformer's choice of attention is one for the whole process in diffusers: no test leaves its own behind."""
    with attention_backend("native"):
        yield
