"""A killed launcher: a second launch is refused while the ranks run, they end, and the run continues exactly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bpgo_video.config.reading import to_yaml
from bpgo_video.config.rules import OWNER
from bpgo_video.training.metrics import read_metrics
from tests.distributed.conftest import free_port
from tests.made.recipes import ROOT, python_path, small_recipe, without_evaluation

pytestmark = pytest.mark.slow

SECONDS_TO_END = 60
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
LAUNCHERS = {
    "--ranks": ([sys.executable, "-m", "bpgo_video", "train"], ["--ranks", "2"]),
    "torchrun": (
        [TORCHRUN, "--nproc-per-node=2", "--master-port={port}", "--module", "bpgo_video", "train"],
        [],
    ),
}


def wait_for(path: Path, log: Path) -> None:
    deadline = time.monotonic() + 180
    while not path.exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


class Launch:
    """A recipe, and one of LAUNCHERS that trains it on two ranks."""

    def __init__(self, name: str, folder: Path, shards: Path) -> None:
        self.name, self.run_dir, self.recipe, self.log = name, folder / "run", folder / "recipe.yaml", folder / "log"
        config = small_recipe(self.run_dir, shards, run={"num_steps": 500, "save_every": 1, "resume": "auto"})
        self.recipe.write_text(to_yaml(without_evaluation(config)))
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}

    def command(self, *flags: str) -> list[str]:
        first, last = LAUNCHERS[self.name]
        return [*(word.format(port=free_port()) for word in first), str(self.recipe), *flags, *last]

    def start(self) -> subprocess.Popen[bytes]:
        """Launch, and wait for the first checkpoint."""
        with self.log.open("wb") as file:
            launcher = subprocess.Popen(
                self.command(), cwd=ROOT, env=self.environment, stdout=file, stderr=file, start_new_session=True
            )
        wait_for(self.run_dir / "checkpoints" / "latest", self.log)
        return launcher

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*flags), cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_killed_launcher_ends_its_ranks_and_leaves_a_run_to_continue(name: str, tmp_path: Path, shards: Path) -> None:
    launch = Launch(name, tmp_path, shards)
    launcher = launch.start()
    second = launch.run()
    assert second.returncode == (1 if name == "torchrun" else 2), second.stderr  # torchrun: 1 for any failure
    assert re.search(r"error: .* is in use by process \d+ on .+, since .+", second.stderr), second.stderr

    ranks = [child for child in psutil.Process(launcher.pid).children(recursive=True) if "train" in child.cmdline()]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=SECONDS_TO_END)
    assert len(ranks) == 2
    assert not alive
    output = launch.log.read_text()
    assert output.count("error:") == 1, output
    assert "has ended without them" in output
    assert "Traceback" not in output
    assert not (launch.run_dir / OWNER).exists()

    done = len(read_metrics(launch.run_dir / "metrics.jsonl"))
    third = launch.run("--run.num-steps", str(done + 1))
    assert third.returncode == 0, third.stderr
    assert [record["step"] for record in read_metrics(launch.run_dir / "metrics.jsonl")] == list(range(done + 1))


def test_all_ranks_of_a_launch_that_lost_its_lease_end_without_a_further_record(tmp_path: Path, shards: Path) -> None:
    launch = Launch("--ranks", tmp_path, shards)
    launcher = launch.start()
    lease = launch.run_dir / OWNER
    taken = json.dumps({**json.loads(lease.read_text()), "token": "other", "host": "node-7", "pid": 77})
    (tmp_path / "taken").write_text(taken)
    (tmp_path / "taken").replace(lease)
    records = (launch.run_dir / "metrics.jsonl").read_bytes()
    assert launcher.wait(SECONDS_TO_END) == 2
    output = launch.log.read_text()
    assert output.count("error:") == 1, output
    assert "the lease was lost to process 77 on node-7" in output
    assert "Traceback" not in output
    assert (launch.run_dir / "metrics.jsonl").read_bytes().count(b"\n") <= records.count(b"\n") + 1, "one in writing"
    assert lease.read_text() == taken
