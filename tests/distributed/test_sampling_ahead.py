"""Sampling ahead on two ranks: which weights sampled, runs resumed bit for bit, requests, and rewards that fail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bpgo_video.rollouts.updates import EXACT, OLDER
from tests.distributed.conftest import run_ranks
from tests.distributed.sameness import assert_same_run, records
from tests.distributed.test_failures import TRAIN, Launches

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 8
RUNS = ("gathered", "sharded", "lora", "rescored")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Eight steps with a checkpoint after every third, whole and resumed from it; other runs for comparison."""
    folder = tmp_path_factory.mktemp("ahead")
    cases = ["on-time=in_advance:gathered:4:1e-4:off", "still=in_advance:gathered:2:1e-30:off"]
    for how in RUNS:
        cases += [f"{how}-whole=in_advance:{how}:{STEPS}"]
        cases += [
            f"{how}-stopped=in_advance:{how}:{steps}" for steps in ("3", "6:1e-4:on:auto", f"{STEPS}:1e-4:on:auto")
        ]
    run_ranks(2, [str(shards), str(folder), *cases], timeout=1000)
    return folder


@pytest.mark.parametrize("how", RUNS)
def test_runs_resumed_from_checkpoints_equal_whole_ones(runs: Path, how: str) -> None:
    assert_same_run(runs / f"{how}-whole", runs / f"{how}-stopped")


def test_gathered_weights_sample_what_sharded_ones_do(runs: Path) -> None:
    assert records(runs / "gathered-whole") == records(runs / "sharded-whole")


def test_each_rollout_has_the_weights_before_the_last_update_but_after_checkpoints(runs: Path) -> None:
    found, on_time, still = (records(runs / name) for name in ("gathered-whole", "on-time", "still"))
    assert [step for step, record in enumerate(found) if OLDER in record] == [1, 2, 4, 5, 7]
    assert all(record[OLDER] > 1e-6 for record in found if OLDER in record), "the policy has moved since it sampled"
    assert [record[EXACT] for record in found if EXACT in record] == [0.0] * 3
    assert found[0] == on_time[0]
    assert found[1]["reward"] == still[1]["reward"], "the starting weights have sampled the second step"
    assert found[1]["reward"] != on_time[1]["reward"]


@pytest.fixture
def launches(tmp_path: Path, shards: Path) -> Iterator[Launches]:
    started = Launches(tmp_path, shards)
    yield started
    started.end_what_is_left()


AHEAD = ["--rollout.sample-ahead", "--run.save-minutes", "0", "--run.save-every", "4"]


def test_a_request_waits_for_the_step_that_has_begun_and_the_run_continues(launches: Launches) -> None:
    flags = [*AHEAD, "--run.num-steps", "6"]
    launch = launches.ranks(TRAIN, "asked", *flags, REWARD_SLEEPS="0 1")
    launch.wait_until((launch.run_dir / "metrics.jsonl").exists)
    launch.wait_for_records(0)
    (launch.run_dir / "save_quit").touch()
    launch.end()
    assert launch.codes == [0, 0], launch.output[-3000:]
    assert launch.checkpoint in ("step-000002", "step-000003", "step-000004")
    assert f"stopped on request, after {int(launch.checkpoint[5:])} of 6 steps" in launch.output
    again = launches.ranks(TRAIN, "asked", *flags).end()
    assert again.codes == [0, 0], again.output[-3000:]
    found = records(launch.run_dir)
    assert [record["step"] for record in found] == list(range(6))
    assert EXACT in found[int(launch.checkpoint[5:])]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("REWARD_FAILS", r"reward 'only' on samples .* failed: RuntimeError: the reward model ran out of patience"),
        ("REWARD_SLEEPS", r"reward 'only' on samples .* has not answered within its timeout of 3 s"),
    ],
)
def test_a_reward_that_fails_on_videos_of_the_next_step_ends_all_ranks_with_its_name(
    launches: Launches, how: str, message: str
) -> None:
    recipe = launches.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("timeout: 1500.0", "timeout: 3.0"))
    launch = launches.ranks(TRAIN, "broken", *AHEAD, **{how: "1 1"})
    launch.wait_until(lambda: all(process.poll() is not None for process in launch.processes))
    assert all(launch.codes)
    assert len(records(launch.run_dir)) == 1, "the second step, sampled before the first update, has failed"
    assert re.search(message, launch.output), launch.output[-3000:]
