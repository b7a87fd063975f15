"""A policy of two transformers on two ranks: an update moves those that it touched, as torch's own optimiser would."""

from __future__ import annotations

import json

import pytest

from tests.distributed.conftest import run_ranks
from tests.families import CASES

pytestmark = pytest.mark.slow

CONFIGS = ("zero1", "zero2", "zero3", "zero3_offload")


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What each rank found, by DeepSpeed configuration."""
    output = tmp_path_factory.mktemp("experts")
    CASES["wan22"].write(output / "pipeline")
    run_ranks(2, [str(output / "pipeline"), str(output), *CONFIGS], worker="experts_worker")
    return [json.loads(path.read_text()) for path in sorted(output.glob("rank*.json"))]


@pytest.mark.parametrize("config", CONFIGS)
def test_updates_that_touch_one_leave_the_other(updates: list[dict[str, dict]], config: str) -> None:
    for found in updates:
        assert max(found[config]["errors"]) < 1e-5
        assert max(map(abs, found[config]["norms"])) < 1e-4


@pytest.mark.parametrize("config", CONFIGS)
def test_an_engine_goes_on_from_a_checkpoint_to_the_bit(updates: list[dict[str, dict]], config: str) -> None:
    assert all(found[config]["resumed"] for found in updates)
