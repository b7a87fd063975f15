"""Resumed runs are bit-equal to uninterrupted ones, under any ZeRO stage and after any kill."""

from __future__ import annotations

import os
import random
import signal
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bpgo_video.training.metrics import read_metrics
from tests.distributed.conftest import STAGES, run_ranks
from tests.distributed.sameness import assert_same_run, records
from tests.distributed.test_failures import TRAIN, Launch, Launches
from tests.distributed.test_training import WEIGHTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KILLS = 10
SETTINGS = ["--run.num-steps", "12", "--run.save-every", "1", "--ema.decay", "0.9"]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Runs of four steps and of two plus two, for every stage, full weights and adapters, and other rank counts."""
    folder = tmp_path_factory.mktemp("halves")
    cases = []
    for stage, lora in product(STAGES, ("full", "lora")):
        cases += [f"{stage}-{lora}-whole=exact:{stage}:{lora}:4"]
        cases += [f"{stage}-{lora}-stopped=exact:{stage}:{lora}:{steps}" for steps in ("2", "4:auto")]
    for stage, lora in (("zero2", "full"), ("zero3", "full"), ("zero3", "lora")):
        cases += [f"slow-{stage}-{lora}-whole=slow_policy:{stage}:{lora}:4"]
        cases += [f"slow-{stage}-{lora}-stopped=slow_policy:{stage}:{lora}:{steps}" for steps in ("2", "4:0.5:auto")]
    moves = [f"{world}-to-{3 - world}=exact:zero{world}:full" for world in (1, 2)]  # zero1 on one rank, zero2 on two
    for world_size, move in zip((1, 2), moves, strict=True):
        run_ranks(world_size, [str(shards), str(folder), f"{move}:2", *(cases if world_size == 2 else [])])
    for world_size, move in zip((2, 1), moves, strict=True):
        name, _, _ = move.partition("=")
        run_ranks(world_size, [str(shards), str(folder), f"{name}=exact:zero{world_size}:full:4:auto"])
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lora", ["full", "lora"])
def test_two_plus_two_steps_equal_four_steps(halves: Path, stage: str, lora: str) -> None:
    assert_same_run(halves / f"{stage}-{lora}-whole", halves / f"{stage}-{lora}-stopped")


@pytest.mark.parametrize("name", ["zero2-full", "zero3-full", "zero3-lora"])
def test_two_plus_two_steps_of_a_slow_old_policy_equal_four_steps(halves: Path, name: str) -> None:
    folder = halves / f"slow-{name}-whole"
    assert_same_run(folder, halves / f"slow-{name}-stopped")
    assert list((folder / "checkpoints" / "step-000004").glob("old-rank-*.safetensors"))


@pytest.mark.parametrize("name", ["1-to-2", "2-to-1"])
def test_two_steps_plus_two_under_another_stage_and_rank_count_equal_four(halves: Path, name: str) -> None:
    whole, moved = records(halves / "zero1-full-whole"), records(halves / name)
    assert [list(record) for record in moved] == [list(record) for record in whole]
    for expected, found in zip(whole, moved, strict=True):
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-5), (expected["step"], key)
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["reward"] == pytest.approx(expected["reward"], abs=1e-5), "the same prompts, each once per epoch"
    for folder in ("export", "export-ema"):
        first, second = (load_file(halves / run / folder / WEIGHTS) for run in ("zero1-full-whole", name))
        assert all((first[key] - second[key]).norm() / first[key].norm() < 1e-5 for key in first), folder


def ended(launch: Launch) -> bool:
    return all(process.poll() is not None for process in launch.processes)


def kill(launch: Launch) -> None:
    for process in launch.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for process in launch.processes:
        process.wait()


def logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(read_metrics(path)) if path.exists() else 0


def wait_for_a_record(launch: Launch) -> None:
    before = logged(launch.run_dir)
    launch.wait_until(lambda: logged(launch.run_dir) != before or ended(launch))


def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path, shards: Path) -> None:
    launches, draws, moments = Launches(tmp_path, shards), random.Random(0), []
    try:
        alone = launches.ranks(TRAIN, "alone", *SETTINGS).end()
        step = sorted(record["seconds"] for record in read_metrics(alone.run_dir / "metrics.jsonl"))[4]
        for number in range(KILLS):
            launch = launches.ranks(TRAIN, "killed", *SETTINGS)
            if number % 3 == 0:  # during startup
                time.sleep(draws.uniform(0, 10))
            else:  # in a step, or in the save after it
                wait_for_a_record(launch)
                time.sleep(draws.uniform(0, 2 * step))  # the save of a step ends during the next one
            kill(launch)
            moments.append(logged(launch.run_dir))
        end = launches.ranks(TRAIN, "killed", *SETTINGS).end()
    finally:
        launches.end_what_is_left()
    assert end.codes == [0, 0], end.output[-5000:]
    assert len(set(moments)) > 2, f"kills must occur at different steps, not all at {moments}"
    assert records(end.run_dir) == records(alone.run_dir)
    assert_same_run(end.run_dir, alone.run_dir)
    for folder in ("export", "export-ema"):
        first, second = (load_file(launch.run_dir / folder / WEIGHTS) for launch in (end, alone))
        assert all(torch.equal(first[name], second[name]) for name in first)
