"""What `rollout.sample_ahead` saves of a step with a slow reward: python -m tools.bench.ahead

One rank trains `tiny_wan_bpgo`, two prompts a step in four chunks, with and without it, six steps each in turn, with a
reward that sleeps for a multiple of the seconds that rollout and update take: like a model on another device or host.
Six steps include the wait for the last scores, as if a checkpoint followed. Prints seconds per step, relative to those
without. Needs the prompts of `bpgo-video demo --prepare`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bpgo_video.cli import show_loading_once
from bpgo_video.config.bpgo import Config, PriorConfig, RewardConfig
from bpgo_video.config.reading import read_yaml
from bpgo_video.distributed import process_group
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.planning.time import seconds_overlapped
from bpgo_video.rollouts.rollout import chunks_of_rank
from bpgo_video.training.inputs import check_inputs
from bpgo_video.training.rl import RL
from tools.bench.timing import seconds

STEPS = 6
ROUNDS = 3
MULTIPLES = (0.5, 1.0, 2.0)  # of the seconds of rollout and update


def settings(config: Config, folder: str, ahead: bool) -> Config:
    """The recipe with one sleeping reward."""
    return replace(
        config,
        run=replace(config.run, dir=folder, num_steps=STEPS, save_every=STEPS, save_minutes=0.0),
        evaluation=replace(config.evaluation, rewards={}, every=0),
        rewards={"waits": RewardConfig(model="tools.bench.overlap:SleepingReward")},
        prior=PriorConfig(kind="constant"),
        rollout=replace(config.rollout, prompts_per_step=2, micro_batch_size=4, sample_ahead=ahead),
    )


class Runs:
    """A run with and one without sampling ahead, which go on in turn."""

    def __init__(self, config: Config, mesh: Mesh, folder: str) -> None:
        chosen = {ahead: settings(config, folder, ahead) for ahead in (False, True)}
        heartbeat = Heartbeat(mesh, timeout=60)  # never started: a failed benchmark is simply rerun
        self.trainers = {key: RL(one, mesh, check_inputs(one, mesh), heartbeat) for key, one in chosen.items()}
        self.steps = dict.fromkeys(self.trainers, 0)
        self.chunks = chunks_of_rank(chosen[True].rollout, mesh)

    def go_on(self, ahead: bool) -> dict[str, float]:
        """STEPS steps: their mean seconds, and those of rollout and update."""
        trainer, first = self.trainers[ahead], self.steps[ahead]
        self.steps[ahead] += STEPS
        records: list[dict[str, float]] = []
        whole = seconds(
            lambda: records.extend(trainer.train_step(first + n, pause=n == STEPS - 1) for n in range(STEPS))
        )
        work = sum(record[f"seconds/{name}"] for record in records for name in ("rollout", "update"))
        return {"work": work / STEPS, "step": whole / STEPS}

    def sleep(self, each_step: float) -> None:
        for trainer in self.trainers.values():
            model: Any = trainer.session.suite.rewards["waits"].model
            model.seconds = each_step / self.chunks


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main() -> None:
    show_loading_once()
    torch.set_num_threads(1)
    mesh, config = process_group.start_ranks(), read_yaml(Path("tiny_wan_bpgo"))
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(config, mesh, folder)
    work = 0.0  # seconds of rollout and update in the last steps without it
    for ahead in (True, False):
        work = runs.go_on(ahead)["work"]
    print(f"{STEPS} steps to each pause, {runs.chunks} chunks a step; median [least, most] of {ROUNDS} repetitions")
    print("reward / (rollout + update)   a step with / without   with, by the plan's closed form / without")
    for multiple in MULTIPLES:
        found: list[tuple[float, float, float]] = []
        for turn in range(ROUNDS):
            reward = multiple * work
            runs.sleep(reward)
            steps = {ahead: runs.go_on(ahead) for ahead in ((False, True) if turn % 2 else (True, False))}
            whole, work = steps[False]["step"], steps[False]["work"]
            parts = {"reward": reward, "rollout": work}
            predicted = sum(parts.values()) - seconds_overlapped(runs.trainers[True].session.config, parts)
            found.append((reward / work, steps[True]["step"] / whole, predicted / whole))
        print(*map(spread, zip(*found, strict=True)), sep="   ", flush=True)
    process_group.stop_ranks()


if __name__ == "__main__":
    main()
