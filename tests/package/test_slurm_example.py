"""The Slurm example: one launcher per node, with stubs in place of Slurm's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.made.recipes import ROOT

STUBS = {
    "scontrol": 'test "$*" = "show hostnames node[7-8]" && printf "node7\\nnode8\\n"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; for n in 0 1; do SLURM_NODEID=$n "$@"; done',
    "deepspeed": 'printf "%s\\n" "$*"',
}
EXPECTED = (
    "--no_ssh --node_rank {rank} --hostfile runs/hostfile-41 --master_addr node7 --master_port 20041 "
    "pipelines/train_video.py --config my recipe.yaml --run.dir runs/mine --run.resume auto"
)


def test_each_node_gets_its_rank_and_otherwise_equal_arguments(tmp_path: Path) -> None:
    for name, body in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/usr/bin/env bash\n{body}\n")
        stub.chmod(0o755)
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "8"}
    result = subprocess.run(
        ["bash", str(ROOT / "docs" / "examples" / "train.sbatch"), "my recipe.yaml", "runs/mine"],
        cwd=tmp_path,
        env={**job, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DEEPSPEED": str(tmp_path / "deepspeed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [EXPECTED.format(rank=rank) for rank in (0, 1)]
    assert (tmp_path / "runs" / "hostfile-41").read_text() == "node7 slots=8\nnode8 slots=8\n"
