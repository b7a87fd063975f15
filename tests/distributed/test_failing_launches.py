"""Launches of two ranks that fail: the first failure is told once, in any phase, on any rank, with its exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bpgo_video.config.reading import to_yaml
from tests.distributed.conftest import free_port
from tests.made.recipes import ROOT, python_path, rewarded_by, small_recipe

pytestmark = pytest.mark.slow

INPUT, CRASH, KILLED = 2, 1, 256 - 9


@dataclass(frozen=True)
class Case:
    """A failing launch.

    Attributes:
        environment: of `mortal.py`.
        code: the launcher's exit code.
        sentence: a pattern that the output has once.
        traceback: whether it has one; never two.
    """

    environment: dict[str, str]
    code: int
    sentence: str
    traceback: bool = False
    flags: tuple[str, ...] = ()
    reward: str = ""


def failed(rank: int, where: str, error: str) -> str:
    return (
        rf"error: rank {rank} \(.+, pid \d+\) failed in phase {where}: {error}; the other ranks end too\. "
        r"The run continues .* --run\.resume auto\."
    )


MADE = "RuntimeError: made to fail"
CASES = {
    "an unknown flag on every rank, rank 0 is late": Case(
        {"LATE": "0"}, INPUT, r"error: command line:\s+--rum.dir: unknown flag", flags=("--rum.dir", "x")
    ),
    "a wrong value on every rank, rank 0 is late": Case(
        {"LATE": "0"},
        INPUT,
        r"error: command line:\s+optim.learning_rate: Input should be greater than 0",
        flags=("--optim.learning-rate", "-1"),
    ),
    "a wrong value on rank 1 only": Case(
        {"FLAGS": "1 --optim.learning-rate -1"},
        INPUT,
        r"error: command line:\s+optim.learning_rate: Input should be greater than 0",
    ),
    "another value on rank 1": Case(
        {"FLAGS": "1 --run.seed 9"}, INPUT, "error: rank 1 on .+ differs from rank 0 on .+ in: run section"
    ),
    "shards are missing on rank 1": Case(
        {"FLAGS": "1 --data.shards /none"}, INPUT, "error: rank 1 on .+: the prompt shards /none do not exist"
    ),
    "shards are missing on rank 0": Case(
        {"FLAGS": "0 --data.shards /none"}, INPUT, "error: rank 0 on .+: the prompt shards /none do not exist"
    ),
    "shards are missing everywhere, rank 0 is late": Case(
        {"LATE": "0"}, INPUT, "error: the prompt shards /none do not exist", flags=("--data.shards", "/none")
    ),
    "an exception before the ranks meet": Case(
        {"FAILS": "1 raise init None"},
        CRASH,
        r"error: rank 1 \(.+\) failed: RuntimeError: made to fail",
        traceback=True,
    ),
    "an exception in evaluation": Case(
        {"FAILS": "1 raise evaluation None"}, CRASH, failed(1, "evaluation", MADE), traceback=True
    ),
    "an exception in rollout of rank 0": Case(
        {"FAILS": "0 raise rollout 0"}, CRASH, failed(0, "rollout of step 0", MADE), traceback=True
    ),
    "an exception in a reward of rank 1": Case(
        {},
        CRASH,
        failed(1, "reward of step 0", r"RewardError: reward 'only' on samples .+ of prompt .+ out of patience.*"),
        traceback=True,
        reward="tests.distributed.toy_rewards:BreaksOnSecondRank",
    ),
    "no memory in update": Case(
        {"FAILS": "1 memory update 0"},
        CRASH,
        failed(1, "update of step 0", r"OutOfMemoryError: CUDA out of memory\. .*"),
        traceback=True,
    ),
    "an exception in a checkpoint": Case(
        {"FAILS": "1 raise checkpoint 0"}, CRASH, failed(1, "checkpoint of step 0", MADE), traceback=True
    ),
    "an exception in export": Case({"FAILS": "0 raise export None"}, CRASH, failed(0, "export", MADE), traceback=True),
    "rank 1 is killed": Case(
        {"FAILS": "1 kill update 0"},
        KILLED,
        r"error: rank 1 \(.+, pid \d+\) died in phase update of step 0; the other ranks end too\. The run continues .*",
    ),
    "rank 0 exits": Case(
        {"FAILS": "0 exit rollout 0"},
        3,
        r"error: rank 0 \(.+, pid \d+\) died; when last heard, it was in phase .*; the other ranks end too\.",
    ),
    "the launcher is terminated": Case(
        {"FAILS": "1 terminate-launcher update 0"}, CRASH, "stopped on request, after 1 of 2 steps, in .*step-000001; "
    ),
}


def launch(case: Case, recipe: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bpgo_video.distributed.launcher", "2", "--log_level=critical"]
    words = [f"--master_port={free_port()}", "--module", "tests.distributed.mortal", "--config", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **case.environment}
    return subprocess.run(
        [*command, *words, *case.flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_first_failure_is_told_once_with_its_exit_code(name: str, tmp_path: Path, shards: Path) -> None:
    case = CASES[name]
    config = small_recipe(tmp_path / "run", shards, run={"num_steps": 2})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(rewarded_by(config, case.reward) if case.reward else config))
    result = launch(case, recipe)
    assert result.returncode == case.code, result.stderr
    assert len(re.findall(case.sentence, result.stdout + result.stderr)) == 1, result.stderr
    assert result.stderr.count("Traceback") == case.traceback, result.stderr
    assert len(result.stderr.splitlines()) <= (60 if case.traceback else 30), result.stderr
