"""Cost of a checkpoint: of its hashes, and of the time that training waits for it.

    python -m tools.bench.saving --output /folder/on/the/disk/to/measure --parameters 60000000

Saves a ZeRO-3 engine on one rank in three ways in turn: as without hashes, hashed, and in the background of matrix
products. A checkpoint takes 12 bytes a parameter. All end on the disk. Prints the medians and their ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from bpgo_video.config.bpgo import OptimConfig, RunConfig
from bpgo_video.distributed import checkpoint, engine, manifest, process_group
from bpgo_video.distributed.mesh import Mesh

WIDTH = 2000
ROUNDS = 9
ROLLOUT = 0.5  # seconds from a save to the next update


class NoHash:
    """Stands in for the hash."""

    def __init__(self, *_: object) -> None:
        pass

    def update(self, data: object) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def unhashed() -> AbstractContextManager[object]:
    return patch.object(manifest.xxhash, "xxh3_128", NoHash)


WAYS: dict[str, tuple[bool, Callable[[], AbstractContextManager[object]]]] = {  # in the background; how it is hashed
    "without hashes": (False, unhashed),
    "hashed": (False, nullcontext),
    "in the background": (True, nullcontext),
}


def build(parameters: int) -> engine.Engine:
    """An engine after its first update, which allocates the optimizer's moments."""
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, parameters // WIDTH**2))]
    learner = engine.Engine(
        nn.Sequential(*layers),
        OptimConfig(),
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        micro_batch_size=1,
        learning_rate_factor=lambda _: 1.0,
        block_classes=(nn.Linear,),
    )
    learner.backward(learner.wrapped(torch.ones(1, WIDTH, requires_grad=True)).square().mean(), last=True)
    learner.step()
    return learner


def measure(learner: engine.Engine, mesh: Mesh, folder: Path) -> dict[str, list[float]]:
    """Seconds that training waits for each checkpoint, by way: in the save, and before the next update."""
    saved: dict[str, list[checkpoint.Saved]] = {way: [] for way in WAYS}
    savers: dict[str, checkpoint.Saver] = {}
    work = torch.randn(WIDTH, WIDTH)
    for step in range(1, ROUNDS + 2):
        for way in WAYS if step % 2 else reversed(WAYS):  # neither is always the first
            asynchronous, hashing = WAYS[way]
            run = RunConfig(dir=str(folder / way), save_async=asynchronous, keep_checkpoints=1)
            saver = savers.setdefault(way, checkpoint.Saver(learner, run, mesh, saved[way].append))
            os.sync()  # what others wrote is no part of this save
            with hashing():
                saver.save(step, {"progress": {"step": step}})
                rollout_ends = time.perf_counter() + ROLLOUT
                while time.perf_counter() < rollout_ends:
                    work @ work
                learner.masters.before_change()
                while len(saved[way]) < step:
                    work @ work
                    saver.poll()
    return {way: [one.seconds for one in found[1:]] for way, found in saved.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.saving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="where to save, in a temporary folder")
    parser.add_argument("--parameters", type=int, default=60_000_000)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    mesh = process_group.start_ranks()
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        every = measure(build(args.parameters), mesh, Path(folder))
    seconds = {way: statistics.median(found) for way, found in every.items()}
    hashing = statistics.median(a - b for a, b in zip(every["hashed"], every["without hashes"], strict=True))
    whole = seconds["hashed"]
    print(f"medians of {ROUNDS} checkpoints of {12 * args.parameters / 1e6:,.0f} MB: training waits")
    for way, value in seconds.items():
        print(f"  {way:<18} {value:.3f} s")
    print(f"hashing takes {hashing / whole:.1%} of a save (median of paired differences)")
    print(f"in the background, training waits {seconds['in the background'] / whole:.1%} of a blocking save")


if __name__ == "__main__":
    main()
