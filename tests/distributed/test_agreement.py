"""A mistake on one node is told by all ranks and stops all; nothing is left behind."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed import engine
from tests.distributed.conftest import run_ranks

Told = list[dict[str, str | None]]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    run_ranks(2, [str(folder)], worker="agreement_worker", timeout=120)
    return folder


@pytest.fixture(scope="module")
def told(output: Path) -> Told:
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("case", "failing"), [("one fails", 1), ("main fails", 0)])
def test_an_error_on_one_rank_is_every_ranks(told: Told, case: str, failing: int) -> None:
    assert told[failing][case] == "FileNotFoundError: the model is missing"
    expected = f"ConfigError: rank {failing} on {socket.gethostname()}: the model is missing"
    assert told[1 - failing][case] == expected


def test_an_error_on_all_ranks_is_each_ones_own(told: Told) -> None:
    assert [verdict["everyone fails"] for verdict in told] == [f"FileNotFoundError: seen by {rank}" for rank in (0, 1)]


def test_what_differs_is_named_and_what_does_not_passes(told: Told) -> None:
    host = socket.gethostname()
    for verdict in told:
        assert str(verdict["other shards"]).startswith(
            f"ConfigError: rank 1 on {host} differs from rank 0 on {host} in: prompt shards;"
        )
        assert verdict["from rank 0"] is None


def test_a_run_folder_that_a_rank_does_not_see_is_refused_and_removed(told: Told, output: Path) -> None:
    first, second = (str(verdict["own folders"]) for verdict in told)
    assert first.startswith(f"ConfigError: rank 1 on {socket.gethostname()}: run.dir ")
    assert "is not the folder that rank 0 has under this name" in second
    assert "storage that all nodes share" in first
    assert [list((output / f"disk-of-{rank}").iterdir()) for rank in (0, 1)] == [[], []]


def test_a_run_folder_that_every_rank_sees_is_left_as_it_is(told: Told, output: Path) -> None:
    assert [verdict["shared folder"] for verdict in told] == [None, None]
    assert list((output / "shared" / "run").iterdir()) == []


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_without_ranks_are_no_runs_of_their_own(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    engine.refuse_lone_tasks()
    monkeypatch.setenv(name, "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=rf"{name} is 2.*docs/multi_node\.md"):
        engine.start_ranks()
