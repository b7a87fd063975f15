"""The Slurm example: one launcher per node, and when the job is requeued, with stubs in place of Slurm's commands."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.made.recipes import ROOT

STUBS = {
    "scontrol": 'if [[ $1 == requeue ]]; then touch "requeued-$2"; exit; fi\n'
    'test "$*" = "show hostnames node[7-8]" && printf "node7\\nnode8\\n"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; for n in 0 1; do SLURM_NODEID=$n "$@" || exit; done',
    "deepspeed": 'printf "%s\\n" "$*"; touch started\n'
    "for n in {1..200}; do [[ -z ${WAITS:-} || -e runs/mine/save_quit ]] && break; sleep 0.05; done\n"
    "exit ${CODE:-0}",
}
EXPECTED = (
    "--no_ssh --node_rank {rank} --hostfile runs/hostfile-41 --master_addr node7 --master_port 20041 "
    "pipelines/train_video.py --config my recipe.yaml --run.dir runs/mine --run.resume auto"
)
JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "8"}


@pytest.fixture
def start(tmp_path: Path) -> Job:
    return Job(tmp_path)


class Job:
    """A job of the script in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, body in STUBS.items():
            stub = folder / name
            stub.write_text(f"#!/usr/bin/env bash\n{body}\n")
            stub.chmod(0o755)
        (folder / "runs" / "mine").mkdir(parents=True)

    def __call__(self, **environment: str) -> subprocess.Popen[str]:
        path = f"{self.folder}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(ROOT / "docs" / "examples" / "train.sbatch"), "my recipe.yaml", "runs/mine"],
            cwd=self.folder, env={**JOB, "PATH": path, "DEEPSPEED": str(self.folder / "deepspeed"), **environment},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def is_requeued(self) -> bool:
        return (self.folder / "requeued-41").exists()


def test_each_node_gets_its_rank_and_otherwise_equal_arguments(start: Job) -> None:
    job = start()
    output, _ = job.communicate()
    assert job.returncode == 0
    assert output.splitlines() == [EXPECTED.format(rank=rank) for rank in (0, 1)]
    assert (start.folder / "runs" / "hostfile-41").read_text() == "node7 slots=8\nnode8 slots=8\n"
    assert not start.is_requeued, "finished"


@pytest.mark.parametrize(
    ("code", "count", "requeued"), [("1", "0", True), ("247", "9", True), ("1", "10", False), ("2", "0", False)]
)
def test_a_failed_job_is_requeued_a_limited_number_of_times(start: Job, code: str, count: str, requeued: bool) -> None:
    job = start(CODE=code, SLURM_RESTART_COUNT=count)
    job.communicate()
    assert job.returncode == int(code)
    assert start.is_requeued == requeued


def test_before_the_time_limit_the_run_saves_and_the_job_is_requeued(start: Job) -> None:
    job = start(WAITS="yes")
    while not (start.folder / "started").exists():
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=20)
    assert job.returncode == 0
    assert len(output.splitlines()) == 2, "both nodes ended by themselves"
    assert start.is_requeued
