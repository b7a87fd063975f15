"""Exponential moving average (EMA) of the trained weights, and its files in checkpoints.

    average <- d average + (1 - d) weights,  d = min(decay, (1 + n) / (10 + n)) after n updates with warm-up, else decay

The old policy of NFT and AWM is another average, which moves after each rollout (`rising_decay`).

It starts at the first weights. It averages the optimizer's fp32 masters, not the weights that the model computes with:
in bf16, a step of 1 - .999 is below half a unit in the last place, so the average would never move. Each rank averages
its own shards, without communication, at 4 bytes per trained element over all ranks.

    ema-rank-00000.safetensors   one per rank: its flat shards by parameter name; old-rank-00000... of the old policy

The header of each file gives the shard's start in the parameter and the parameter's shape, so that any number of ranks
can read the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from bpgo_video.config.bpgo import EmaConfig
from bpgo_video.distributed.manifest import CheckpointError, write_file
from bpgo_video.distributed.optimizer import ZeroMasters
from bpgo_video.distributed.snapshot import Sink
from bpgo_video.distributed.zero_files import StoredParameters

MISSING = {  # by the name of an average, what its absence means
    "ema": "its run kept no average of the weights; use the raw weights, or train with ema.decay above 0",
    "old": "its run sampled with the trained weights; continue it with loss.old_decay 0, or start a new run",
}


def decay_after(updates: int, config: EmaConfig) -> float:
    """d in the update that follows `updates` earlier ones."""
    return min(config.decay, (1 + updates) / (10 + updates)) if config.warmup else config.decay


def rising_decay(moves: int, rate: float, largest: float) -> float:
    """min(rate i, largest), i the number of this move: eta_i of DiffusionNFT (arXiv 2509.16117).

    Args:
        moves: earlier ones.
    """
    return min(rate * (moves + 1), largest)


class EMA:
    """The average of one engine's trained weights; each rank holds it for its own shards.

    Args:
        decay: d by the number of earlier updates, or the settings of `decay_after`.
        name: of its files.
    """

    def __init__(self, masters: ZeroMasters, decay: EmaConfig | Callable[[int], float], name: str = "ema") -> None:
        self.name, self._masters = name, masters
        self._decay = partial(decay_after, config=decay) if isinstance(decay, EmaConfig) else decay
        self._weights = masters.shards()
        self.shards = [replace(shard, values=shard.values.clone()) for shard in self._weights]
        self.updates = 0

    def update(self) -> None:
        """Average in the weights after an update."""
        keep = self._decay(self.updates)
        self.updates += 1
        if self.shards:  # small models leave some ranks without any
            averages, weights = ([shard.values for shard in shards] for shards in (self.shards, self._weights))
            torch._foreach_lerp_(averages, weights, 1 - keep)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Compute with the average inside the block, and with the weights after it, bit for bit.

        Swaps weights and average, which needs memory for one more shard. All ranks enter and leave together, outside
        `Engine.whole_weights`; nothing is updated or saved inside. If the block raises, the weights are not swapped
        back, since that is a collective that other ranks would miss: the run must end.
        """
        self._swap()
        yield
        self._swap()

    def _swap(self) -> None:
        self._masters.before_change()
        for average, weights in zip(self.shards, self._weights, strict=True):
            held = weights.values.clone()
            weights.values.copy_(average.values)
            average.values.copy_(held)
        self._masters.publish()


def save_average(ema: EMA, folder: Path, rank: int, sink: Sink = write_file) -> None:
    """Pass this rank's shards of the average to `sink`, as a file of a checkpoint's folder; by default, write it."""
    header = {shard.name: {"start": shard.start, "shape": shard.shape} for shard in ema.shards}
    tensors = {shard.name: shard.values.contiguous() for shard in ema.shards}
    metadata = {"shards": json.dumps(header), "updates": str(ema.updates)}
    sink((tensors, metadata), folder / f"{ema.name}-rank-{rank:05d}.safetensors")


def load_average(ema: EMA, folder: Path) -> None:
    """Continue the average from a checkpoint of any number of ranks and any ZeRO stage.

    Raises:
        CheckpointError: it holds none, or one of another model.
    """
    saved = AverageParameters(folder, ema.name)
    for shard in ema.shards:
        saved.load_into(shard)
    ema.updates = saved.updates


class AverageParameters(StoredParameters):
    """The average in a checkpoint, as `ZeroParameters` are the raw weights.

    Attributes:
        updates: that the average has seen.

    Raises:
        CheckpointError: the run kept no average, or files are missing.
    """

    def __init__(self, folder: Path, name: str = "ema"):
        super().__init__(folder)
        paths = sorted(folder.glob(f"{name}-rank-*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder} holds no {name}-rank-*.safetensors: {MISSING[name]}")
        for path in paths:
            file = safe_open(path, framework="pt")  # stays open for the slices
            metadata = file.metadata()
            self.updates = int(metadata["updates"])
            for name, shard in json.loads(metadata["shards"]).items():
                piece = file.get_slice(name)
                self.shapes[name] = tuple(shard["shape"])
                self.pieces.setdefault(name, []).append((shard["start"], piece.get_shape()[0], piece))
