"""Failures of ranks and stop requests: a run interrupted in many ways records the same as an uninterrupted one.

Starting takes longer than a step, so each launch resumes where the previous one ended; a successful resume shows that
the last checkpoint is intact. Finally, both runs must have written the same records.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from bpgo_video.config.reading import to_yaml
from bpgo_video.training.metrics import read_metrics
from tests.distributed.conftest import free_port
from tests.made.recipes import ROOT, python_path, rewarded_by, small_recipe, without_evaluation

pytestmark = pytest.mark.slow

STEPS = 16
SECONDS_TO_END = 60  # time limit for the other ranks to exit after one dies
TRAIN = ["pipelines/train_video.py"]
MORTAL = "tests.distributed.mortal"  # as a module, because a script's folder comes first in sys.path


FROZEN = """
import os, signal, sys, time
import torch
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
with Heartbeat(Mesh(rank, 2, torch.device("cpu")), timeout=2) as heartbeat:
    heartbeat.enter("reward", 4)
    time.sleep(4)  # busy, and longer than the timeout
    torch.distributed.barrier()
    if rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
"""


@dataclass
class Launch:
    """The processes of one launch in rank order, or the launcher's process."""

    processes: list[subprocess.Popen[bytes]]
    log: Path
    run_dir: Path
    seconds_to_end: float = 0.0
    checkpoint: str = ""

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def codes(self) -> list[int | None]:
        return [process.returncode for process in self.processes]

    def wait_until(self, met: Callable[[], bool], timeout: float = 180) -> None:
        deadline = time.monotonic() + timeout
        while not met():
            assert time.monotonic() < deadline, self.output[-5000:]
            time.sleep(0.05)

    def wait_for_records(self, more_than: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        self.wait_until(lambda: len(metrics.read_text().splitlines()) > more_than)

    def wait_for_a_death(self) -> None:
        self.wait_until(lambda: any(process.poll() is not None for process in self.processes))

    def end(self) -> Launch:
        """Wait until all processes have ended."""
        now = time.monotonic()
        self.wait_until(lambda: all(process.poll() is not None for process in self.processes))
        self.seconds_to_end = time.monotonic() - now
        self.checkpoint = (self.run_dir / "checkpoints" / "latest").read_text()
        return self


class Launches:
    """Launches a recipe repeatedly on two ranks, each time resuming from the last checkpoint."""

    def __init__(self, folder: Path, shards: Path):
        self.folder = folder
        saved = {"save_every": 2, "save_async": False}  # in the background, a death may come before it is complete
        config = small_recipe(folder / "unused", shards, run={"num_steps": STEPS, "resume": "auto", **saved})
        config = without_evaluation(rewarded_by(config, "tests.distributed.toy_rewards:ScriptedRedness"))
        (folder / "recipe.yaml").write_text(to_yaml(config))
        self.started: list[Launch] = []

    def ranks(self, script: list[str], run: str, *flags: str, **environment: str) -> Launch:
        """Two ranks without a launcher."""
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
        places = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return self._start([sys.executable], script, run, flags, places)

    def launcher(self, script: list[str], run: str, *flags: str, **environment: str) -> Launch:
        """The `deepspeed` command, in a separate process group."""
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        command = [deepspeed, "--num_accelerators", "2", "--master_port", str(free_port())]
        return self._start(command, script, run, flags, [environment])

    def _start(
        self,
        command: list[str],
        script: list[str],
        run: str,
        flags: tuple[str, ...],
        environments: list[dict[str, str]],
    ) -> Launch:
        line = [*command, *script, "--config", str(self.folder / "recipe.yaml"), "--run.dir", str(self.folder / run)]
        base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
        log = self.folder / f"{len(self.started)}.log"
        with log.open("wb") as file:
            processes = [
                subprocess.Popen(
                    [*line, *flags], cwd=ROOT, env={**base, **environment}, stdout=file, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for environment in environments
            ]  # fmt: skip
        self.started.append(Launch(processes, log, self.folder / run))
        return self.started[-1]

    def end_what_is_left(self) -> None:
        for launch in self.started:
            for process in launch.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def interrupted_run(launches: Launches) -> dict[str, Launch]:
    """All launches of the interrupted run, by what happened to them; each failed launch is followed by the next."""
    launched = {}

    launch = launched["death in rollout"] = launches.ranks(["-m", MORTAL], "broken", FAILS="1 kill rollout 2")
    launch.wait_for_a_death()
    launch.processes[0].terminate()  # as launchers do
    launch.end()

    launch = launched["death of rank 0"] = launches.ranks(TRAIN, "broken", REWARD_SLEEPS="0 1", REWARD_DIES="0 1")
    launch.wait_for_a_death()
    launch.end()

    launch = launched["death in update"] = launches.launcher(["--module", MORTAL], "broken", FAILS="1 kill update 5")
    launch.wait_until(lambda: "Killing subprocess" in launch.output)
    launch.end()

    launch = launched["death in reward"] = launches.launcher(TRAIN, "broken", REWARD_DIES="1 2")
    launch.wait_until(lambda: "Killing subprocess" in launch.output)
    launch.end()

    launch = launched["SIGTERM"] = launches.ranks(TRAIN, "broken")
    launch.wait_for_records(6)
    launch.processes[1].terminate()
    launch.end()

    steps = len(read_metrics(launch.run_dir / "metrics.jsonl"))
    launch = launched["SIGTERM to the launcher's group"] = launches.launcher(TRAIN, "broken")
    launch.wait_for_records(steps)
    os.killpg(launch.processes[0].pid, signal.SIGTERM)
    launch.wait_until(lambda: "Main process received SIGTERM" in launch.output)
    launch.end()

    steps = len(read_metrics(launch.run_dir / "metrics.jsonl"))
    launch = launched["files"] = launches.launcher(TRAIN, "broken")
    launch.wait_for_records(steps)
    (launch.run_dir / "save").touch()
    launch.wait_until(lambda: not (launch.run_dir / "save").exists())
    (launch.run_dir / "save_quit").touch()
    launch.end()

    launched["end"] = launches.ranks(TRAIN, "broken").end()
    return launched


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Launches:
    return Launches(tmp_path_factory.mktemp("launches"), shards)


@pytest.fixture(scope="module")
def launched(launches: Launches) -> dict[str, Launch]:
    """Results of each launch of the interrupted run and, as "alone", of the uninterrupted one."""
    try:
        slow = launches.ranks(TRAIN, "alone", "--parallel.heartbeat-timeout", "3", REWARD_SLEEPS="1 3").end()
        return {**interrupted_run(launches), "alone": slow}
    finally:
        launches.end_what_is_left()


@pytest.mark.parametrize(
    ("death", "message", "codes", "checkpoint"),
    [
        ("death in rollout", r"error: rank 1 \(.+, pid \d+\) died in phase rollout of step 2;", [1, -9], 2),
        (
            "death of rank 0",
            r"error: rank 0 \(.+, pid \d+\) died; when last heard, .* in phase reward of step 3;",
            [-9, 1],
            2,
        ),
        ("death in update", r"error: rank 1 \(.+, pid \d+\) died in phase update of step 5;", [247], 4),
        ("death in reward", r"error: rank 1 \(.+, pid \d+\) died in phase reward of step 6;", [247], 6),
    ],
)
def test_a_dead_rank_ends_the_others_and_is_named(
    launched: dict[str, Launch], death: str, message: str, codes: list[int], checkpoint: int
) -> None:
    launch = launched[death]
    assert re.search(message, launch.output), launch.output[-5000:]
    assert "--run.resume auto" in launch.output
    assert "Traceback" not in launch.output, "the message names the dead rank, without the network library's traceback"
    assert launch.codes == codes
    assert launch.seconds_to_end < SECONDS_TO_END
    assert launch.checkpoint == f"step-{checkpoint:06d}"


def test_sigterm_to_one_rank_stops_all_after_a_complete_step(launched: dict[str, Launch]) -> None:
    launch = launched["SIGTERM"]
    assert launch.codes == [0, 0]
    assert_stopped(launch)


def test_repeated_sigterm_to_the_launchers_group_stops_and_saves(
    launched: dict[str, Launch],
) -> None:
    launch = launched["SIGTERM to the launcher's group"]
    assert "a second one" not in launch.output
    assert_stopped(launch)


def test_save_quit_saves_and_stops_and_save_continues(launched: dict[str, Launch]) -> None:
    launch = launched["files"]
    assert launch.codes == [0]
    assert "saved on request, after " in launch.output
    assert not (launch.run_dir / "save_quit").exists()
    assert_stopped(launch)


def assert_stopped(launch: Launch) -> None:
    found = re.search(rf"stopped on request, after (\d+) of {STEPS} steps, in .*; .* --run.resume auto", launch.output)
    assert found, launch.output[-5000:]
    assert launch.checkpoint == f"step-{int(found[1]):06d}"
    assert int(found[1]) < STEPS
    assert "summary.json" not in launch.output, "an unfinished run has no results"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank_is_distinguished_from_a_busy_one(tmp_path: Path, victim: int) -> None:
    place = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": python_path(),
    }
    command = [sys.executable, "-c", FROZEN, str(victim)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **place, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        _, output = ranks[1 - victim].communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[1 - victim].returncode == 1
    how = "died or cannot be reached; when last heard," if victim == 0 else r"has been silent for \d s;"
    found = rf"error: rank {victim} \(.*\) {how} it was in phase reward of step 4;"
    assert re.search(found, output), output


def test_a_reward_slower_than_the_heartbeat_is_not_a_dead_rank(launched: dict[str, Launch]) -> None:
    launch = launched["alone"]
    assert launch.codes == [0, 0], launch.output[-5000:]
    assert any(record["seconds/reward"] > 6 for record in read_metrics(launch.run_dir / "metrics.jsonl"))


def test_a_repeatedly_interrupted_run_writes_the_records_of_an_uninterrupted_one(launched: dict[str, Launch]) -> None:
    assert launched["end"].codes == [0, 0], launched["end"].output[-5000:]
    broken, alone = (
        [
            {name: value for name, value in record.items() if not name.startswith(("seconds", "checkpoint"))}
            for record in read_metrics(launched[name].run_dir / "metrics.jsonl")
        ]
        for name in ("end", "alone")
    )
    assert len(alone) == STEPS
    assert broken == alone
