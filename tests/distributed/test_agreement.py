"""Errors on one rank stop all ranks, which name it; ranks wait for rank 0's work without a collective."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed import process_group

Outcomes = list[dict[str, str | None]]
CPU = torch.device("cpu")


@pytest.fixture
def agreement(shared: dict[str, dict[int, Path]]) -> Path:
    return shared["agreement"][2]


@pytest.fixture
def outcomes(agreement: Path) -> Outcomes:
    return [json.loads((agreement / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("case", "failing"), [("one fails", 1), ("main fails", 0)])
def test_an_error_on_one_rank_is_raised_on_every_rank(outcomes: Outcomes, case: str, failing: int) -> None:
    assert outcomes[failing][case] == "FileNotFoundError: the model is missing"
    expected = f"OtherRankError: rank {failing} on {socket.gethostname()}: the model is missing"
    assert outcomes[1 - failing][case] == expected


def test_an_error_on_all_ranks_is_raised_unchanged(outcomes: Outcomes) -> None:
    assert [verdict["everyone fails"] for verdict in outcomes] == [
        f"FileNotFoundError: seen by {rank}" for rank in (0, 1)
    ]


def test_differences_between_ranks_are_named(outcomes: Outcomes) -> None:
    host = socket.gethostname()
    for verdict in outcomes:
        assert str(verdict["other shards"]).startswith(
            f"ConfigError: rank 1 on {host} differs from rank 0 on {host} in: prompt shards;"
        )
        assert verdict["from rank 0"] is None


def test_a_run_folder_that_is_not_shared_is_refused_and_removed(outcomes: Outcomes, agreement: Path) -> None:
    first, second = (str(verdict["own folders"]) for verdict in outcomes)
    assert first.startswith(f"OtherRankError: rank 1 on {socket.gethostname()}: run.dir ")
    assert "is not the folder that rank 0 has under this name" in second
    assert "storage that all nodes share" in first
    assert [list((agreement / f"disk-of-{rank}").iterdir()) for rank in (0, 1)] == [[], []]


def test_a_shared_run_folder_is_unchanged(outcomes: Outcomes, agreement: Path) -> None:
    assert [verdict["shared folder"] for verdict in outcomes] == [None, None]
    assert list((agreement / "shared" / "run").iterdir()) == []


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_of_one_job_do_not_run_as_separate_single_ranks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    process_group.refuse_lone_tasks()
    monkeypatch.setenv(name, "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=rf"{name} is 2.*docs/multi_node\.md"):
        process_group.start_ranks()
