"""Mutation check: wrong lines in the learner, samplers, replay, sharding and resume, which tests must catch.

    python -m tools.checks.mutate          # about six minutes; it prints `caught` or `MISSED` for each mutation

Each mutation changes one line in a copy of this tree and runs one test file there. A missed mutation, or one whose line
no longer exists, sets exit code 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    file: str
    line: str
    mutated: str
    tests: str


MUTATIONS = [
    # learner: sign of Eq 2; the pessimistic bound of PPO
    Mutation(
        "learner/equations.py", "(2 * torch.sigmoid(x) - 1)", "(1 - 2 * torch.sigmoid(x))", "learner/test_bpgo.py"
    ),
    Mutation("learner/losses.py", "-torch.minimum(ratio", "-torch.maximum(ratio", "learner/test_losses.py"),
    # sampler: wrong factor in the drift that keeps the marginals; noise that does not depend on the sample
    Mutation(
        "diffusion/sde.py",
        "variance / (2 * step.sigma) * noise",
        "variance / step.sigma * noise",
        "diffusion/test_sde.py",
    ),
    Mutation("randomness.py", "repr(key).encode()", "repr(key[:-2]).encode()", "rollouts/test_rollout.py"),
    # replay: density of the wrong latents; gradients not averaged over micro-batches
    Mutation("rollouts/replay.py", "latents[:, index + 1]", "latents[:, index]", "rollouts/test_replay.py"),
    Mutation("rollouts/updates.py", "loss.value / len(micro_batches)", "loss.value", "rollouts/test_replay.py"),
    # sharding: a skipped last micro-batch; a gather without the other ranks' gradients; a wrong start of a shard
    Mutation(
        "distributed/mesh.py", "-(-total // unit) * micro", "max(1, total // unit) * micro", "distributed/test_mesh.py"
    ),
    Mutation(
        "distributed/ulysses.py",
        "        dist.all_reduce(total, group=ctx.group)\n",
        "",
        "distributed/test_sequence.py",
    ),
    Mutation(
        "distributed/zero_files.py", "start += length + gap", "start += length", "distributed/test_zero_parameters.py"
    ),
    # resume: a stream that restarts at 0; `latest` names a checkpoint that does not exist yet
    Mutation("data/stream.py", "self.position = start\n", "self.position = 0\n", "data/test_reader.py"),
    Mutation("distributed/checkpoint.py", "    partial.rename(folder)\n", "", "distributed/test_checkpoint.py"),
]


def caught(mutation: Mutation, tree: Path) -> bool:
    """Whether the tests fail on a tree with the mutation; the tree is restored."""
    path = tree / "bpgo_video" / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.line) != 1:
        raise SystemExit(f"error: {mutation.file} has {mutation.line!r} {source.count(mutation.line)} times, not once")
    path.write_text(source.replace(mutation.line, mutation.mutated), encoding="utf-8")
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow and not gpu", f"tests/{mutation.tests}"]
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, encoding="utf-8")
    path.write_text(source, encoding="utf-8")
    if run.returncode not in (0, 1):  # 1: tests ran, and one failed
        raise SystemExit(f"error: tests/{mutation.tests} did not run:\n{run.stdout}{run.stderr}")
    return run.returncode == 1


def main() -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "build"))
        for mutation in MUTATIONS:
            is_caught = caught(mutation, tree)
            missed += not is_caught
            print(
                f"{'caught' if is_caught else 'MISSED'}  {mutation.file}: {mutation.mutated.strip() or 'line removed'}",
                flush=True,
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
