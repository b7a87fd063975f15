"""EMA of the weights under ZeRO 1, 2 and 3, in fp32 and bf16: values, sharding, and swapping with the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ema_worker import CASES, Block

TRAINED = {name: parameter.numel() for name, parameter in Block().named_parameters() if parameter.requires_grad}


@pytest.fixture(params=[1, 2])
def averages(request: pytest.FixtureRequest, shared: dict[str, dict[int, Path]]) -> list[list[dict[str, Any]]]:
    """Results by rank."""
    return [json.loads(path.read_text()) for path in sorted(shared["averages"][request.param].glob("rank*.json"))]


def test_ranks_average_disjoint_shards_that_cover_every_trained_element(
    averages: list[list[dict[str, Any]]],
) -> None:
    for results in zip(*averages, strict=True):
        assert sum(result["elements"] for result in results) == sum(TRAINED.values()), results[0]
        assert max(result["elements"] for result in results) <= sum(TRAINED.values()) / len(results) + len(TRAINED)


def test_the_average_is_computed_from_the_fp32_weights(averages: list[list[dict[str, Any]]]) -> None:
    for result in averages[0]:
        assert result["names"] == sorted(TRAINED)
        assert result["error"] < 1e-6, result


@pytest.mark.parametrize("fact", ["inside", "moved", "restored", "output", "gathered", "trains on"])
def test_the_model_uses_the_average_inside_the_context_and_its_weights_after_it(
    averages: list[list[dict[str, Any]]], fact: str
) -> None:
    assert [result for results in averages for result in results if not result[fact]] == []
    assert all(len(results) == len(CASES) for results in averages)
