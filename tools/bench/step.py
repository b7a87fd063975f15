"""Seconds of a whole training step relative to a loop of plain PyTorch, `plain_loop.py`: part of `make bench`.

    bpgo-video demo --prepare
    python -m tools.bench.step

Starts two ranks of one thread; the compiled blocks need a C++ compiler. Each case runs bpgo_video under several
settings and the plain loop in turn, step by step. A line has the median of the ratios of steps that follow each other,
and its 95 % interval: wall time, and processor time of rank 0, which other load disturbs less.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import quantile_test

from bpgo_video.cli import show_loading_once
from bpgo_video.config.bpgo import Config
from bpgo_video.config.reading import read_yaml
from bpgo_video.data.stream import PromptStream
from bpgo_video.distributed import process_group
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rollouts.rules import trained_steps_of
from bpgo_video.training.inputs import check_inputs
from bpgo_video.training.rl import RL
from tools.bench.plain_loop import PlainLoop
from tools.bench.timing import seconds

ROUNDS = 15
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # recipe, and settings of `rollout`
    "all seven steps trained (tiny_wan_full)": ("tiny_wan_full", {}),
    "two steps trained, the same forwards (tiny_wan_bpgo without same_start)": ("tiny_wan_bpgo", {"same_start": False}),
    "two steps trained, as shipped (tiny_wan_bpgo)": ("tiny_wan_bpgo", {}),
}
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # DeepSpeed's JSON, settings of `optim` and `policy`
    "ZeRO-1": ("zero1", {}, {}),
    "ZeRO-3": ("zero3", {}, {}),
    "ZeRO-3, optim.average: update": ("zero3", {"average": "update"}, {}),
    "the same, policy.compile_blocks": ("zero3", {"average": "update"}, {"compile_blocks": True}),
}
Step = Callable[[int], object]  # number of the training step


def ours(config: Config, mesh: Mesh) -> Step:
    """A training step of bpgo_video."""
    return RL(config, mesh, check_inputs(config, mesh), Heartbeat(mesh, timeout=60)).train_step


def plain(config: Config, mesh: Mesh, trainer: RL) -> Step:
    """A step of the plain loop with the prompts and trained steps of the same step."""
    session, rollout = trainer.session, config.rollout
    batches = PromptStream(session.shards, config.data.split, config.run.seed, rollout.prompts_per_step)
    loop = PlainLoop(config, mesh, batches, session.policy.latent_shape(config.video))
    return lambda step: loop.train_step(trained_steps_of(session.policy, config, step))


def measured(works: dict[str, Step], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each step by clock, after two steps that are not measured."""
    for step in range(2):
        for work in works.values():
            work(step)
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in works} for clock in CLOCKS}
    for step in range(2, 2 + rounds):
        for name, work in works.items():
            started = time.process_time()
            times["wall"][name].append(seconds(partial(work, step)))
            times["processor"][name].append(time.process_time() - started)
    return times


def median_and_interval(ratios: np.ndarray[Any, Any]) -> str:
    """The median and its 95 % interval by order statistics."""
    interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return f"{np.median(ratios):.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def compare(name: str, mesh: Mesh, rounds: int) -> None:
    """Print a case's ratios."""
    recipe, changes = CASES[name]
    base = read_yaml(Path(recipe))
    rollout, evaluation = replace(base.rollout, **changes), replace(base.evaluation, rewards={})
    works = {}
    for way, (zero, optim, policy) in WAYS.items():
        sections = {"optim": replace(base.optim, **optim), "policy": replace(base.policy, **policy)}
        config = replace(base, deepspeed=zero, rollout=rollout, evaluation=evaluation, **sections)
        works[way] = ours(config, mesh)
    works["plain PyTorch"] = plain(config, mesh, next(iter(works.values())).__self__)  # type: ignore[attr-defined]
    times = measured(works, rounds)
    if not mesh.is_main:
        return
    print(f"{name}, relative to the plain loop: wall; processor")
    plain_times = {clock: np.array(of_clock.pop("plain PyTorch")) for clock, of_clock in times.items()}
    for way in WAYS:
        ratios = [median_and_interval(np.array(times[clock][way]) / plain_times[clock]) for clock in CLOCKS]
        print(f"  {way}: {'; '.join(ratios)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measured steps of each (%(default)s)")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tools.bench.step"]
        command = [sys.executable, *launcher, "--rounds", str(args.rounds)]
        raise SystemExit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)
    show_loading_once()
    mesh = process_group.start_ranks()
    for name in CASES:
        compare(name, mesh, args.rounds)
    process_group.stop_ranks()


if __name__ == "__main__":
    main()
