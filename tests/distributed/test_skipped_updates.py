"""An update whose gradient is not finite on one rank changes nothing on any rank; too many in a row end the run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.conftest import run_ranks
from tests.distributed.skip_worker import CASES

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of both ranks."""
    folder = tmp_path_factory.mktemp("skipped")
    run_ranks(2, [str(folder)], worker="skip_worker")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_a_run_with_skipped_updates_equals_a_run_without_them_bit_for_bit(results: Results, number: int) -> None:
    for result in results:
        case = result["cases"][number]
        finite = iter(map(str, case["norms"]))
        assert case["poisoned"] == [next(finite) if batch != "inf" else "inf" for batch in case["poisoned"]]
        assert case["poisoned"].count("inf") == 2
        assert case["equal"], case


def test_a_run_ends_with_whole_weights_after_more_skipped_updates_than_allowed(results: Results) -> None:
    for result in results:
        assert "not finite in 2 updates in a row, more than optim.max_skipped allows (1)" in result["ended"]["error"]
        assert result["ended"]["skipped"] == 1
        assert result["ended"]["unchanged"]
