"""The checks of `make gpu`, one test each: properties that only a GPU can show."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from bpgo_video.distributed.process_group import stop_ranks
from tools.gpu.bench import Bench, published, start
from tools.gpu.checks import CHECKS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    environment = dict(os.environ)
    yield start(tmp_path_factory.mktemp("gpu"), published())
    stop_ranks()
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("name", CHECKS)
def test_the_check_holds(bench: Bench, name: str) -> None:
    found = CHECKS[name](bench)
    if "cannot" in found:
        pytest.skip(found["cannot"])
    assert found["holds"], found
