"""A full disk on one rank: all ranks exit and name it, the previous checkpoint is intact, and the run resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.sameness import records
from tests.distributed.test_failures import MORTAL, TRAIN, Launches

pytestmark = pytest.mark.slow

SETTINGS = ["--run.num-steps", "4", "--ema.decay", "0.9", "--deepspeed", "ds_configs/zero3.json"]


def test_a_full_disk_on_any_rank_ends_all_ranks_and_damages_nothing(tmp_path: Path, shards: Path) -> None:
    launches = Launches(tmp_path, shards)
    try:
        for victim in (0, 1):
            launch = launches.ranks(["-m", MORTAL], "full", *SETTINGS, FAILS=f"{victim} full-disk checkpoint 3")
            launch.end()
            assert launch.codes == [2, 2], launch.output[-5000:]
            assert launch.output.count(f"error: rank {victim} (") == 1
            assert "failed in phase checkpoint of step 3: CheckpointError: the checkpoint of step 4" in launch.output
            assert "the newest complete one is step-000002, untouched" in launch.output
            assert launch.checkpoint == "step-000002"
        end = launches.ranks(TRAIN, "full", *SETTINGS).end()
        alone = launches.ranks(TRAIN, "alone", *SETTINGS).end()
    finally:
        launches.end_what_is_left()
    assert end.codes == [0, 0], end.output[-5000:]
    assert not list((end.run_dir / "checkpoints").glob("partial-*"))
    assert records(end.run_dir) == records(alone.run_dir)
