"""A killed launcher: a second launch is refused while the ranks run, they end, and the run continues exactly."""

from __future__ import annotations

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


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_killed_launcher_ends_its_ranks_and_leaves_a_run_to_continue(name: str, tmp_path: Path, shards: Path) -> None:
    run_dir, recipe, log = tmp_path / "run", tmp_path / "recipe.yaml", tmp_path / "log"
    config = small_recipe(run_dir, shards, run={"num_steps": 500, "save_every": 1, "resume": "auto"})
    recipe.write_text(to_yaml(without_evaluation(config)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}

    def command(*flags: str) -> list[str]:
        first, last = LAUNCHERS[name]
        return [*(word.format(port=free_port()) for word in first), str(recipe), *flags, *last]

    with log.open("wb") as file:
        launcher = subprocess.Popen(
            command(), cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    wait_for(run_dir / "checkpoints" / "latest", log)
    second = subprocess.run(command(), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == (1 if name == "torchrun" else 2), second.stderr  # torchrun: 1 for any failure
    assert re.search(r"error: .* is in use by process \d+ on .+, since .+", second.stderr), second.stderr

    ranks = [child for child in psutil.Process(launcher.pid).children(recursive=True) if "train" in child.cmdline()]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=SECONDS_TO_END)
    assert len(ranks) == 2
    assert not alive
    output = log.read_text()
    assert output.count("error:") == 1, output
    assert "has ended without them" in output
    assert "Traceback" not in output
    assert not (run_dir / OWNER).exists()

    done = len(read_metrics(run_dir / "metrics.jsonl"))
    flags = ["--run.num-steps", str(done + 1)]
    third = subprocess.run(command(*flags), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == list(range(done + 1))
