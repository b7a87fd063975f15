"""Priors on two ranks: the anchors of one rank, a sharded policy, sequence groups, and a killed measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import run_ranks

pytestmark = pytest.mark.slow

CASES = ["whole=1:1:auto", "sharded=3:1:sharded", "gathered=3:1:gathered", "sequence=3:2:sharded"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[int, Path]:
    """Results of one and of two ranks."""
    found = {ranks: tmp_path_factory.mktemp(f"priors{ranks}") for ranks in (1, 2)}
    run_ranks(1, [str(shards), str(found[1]), "whole=1:1:auto"], worker="priors_worker")
    run_ranks(2, [str(shards), str(found[2]), *CASES], worker="priors_worker")
    return found


def result(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{name}-rank{rank}.json").read_text())


@pytest.mark.parametrize("name", ["whole", "sharded", "gathered", "sequence"])
def test_two_ranks_measure_the_anchors_of_one(folders: dict[int, Path], name: str) -> None:
    one, two = result(folders[1], "whole"), result(folders[2], name)
    assert two["anchors"].keys() == one["anchors"].keys()
    for id_, anchor in one["anchors"].items():
        assert two["anchors"][id_] == pytest.approx(anchor, rel=1e-4, abs=1e-6)
    assert two["scale"] == pytest.approx(one["scale"], rel=1e-4)
    other = result(folders[2], name, rank=1)
    assert (other["anchors"], other["scale"]) == (two["anchors"], two["scale"])


@pytest.mark.parametrize(
    ("name", "share", "rounds"), [("whole", 0.0, 4), ("sharded", 1.0, 4), ("sequence", 1.0, 8), ("gathered", 0.0, 4)]
)
def test_no_rank_holds_the_weights_of_a_sharded_policy_between_rounds(
    folders: dict[int, Path], name: str, share: float, rounds: int
) -> None:
    for rank in (0, 1):
        assert result(folders[2], name, rank)["sharded"] == [share] * rounds


def test_a_killed_measurement_loses_one_round(folders: dict[int, Path], tmp_path: Path, shards: Path) -> None:
    with pytest.raises(AssertionError):
        run_ranks(2, [str(shards), str(tmp_path), "sharded=3:1:sharded:3"], worker="priors_worker")
    notes = (tmp_path / "sharded-shards" / "priors" / "unfinished.jsonl").read_text().splitlines()
    assert len(notes) == 1 + 3 * 2, "settings, and three rounds of a group of two prompts"
    run_ranks(2, [str(shards), str(tmp_path), "sharded=3:1:sharded"], worker="priors_worker")
    again = result(tmp_path, "sharded")
    assert len(again["sharded"]) == 1
    whole = json.loads((folders[2] / "sharded-shards" / "priors" / "only.json").read_text())
    assert json.loads((tmp_path / "sharded-shards" / "priors" / "only.json").read_text()) == whole
