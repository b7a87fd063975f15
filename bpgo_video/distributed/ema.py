"""What is the average of the weights over the updates so far? An exponential one, on each rank's own fp32 shards.

    average <- d average + (1 - d) weights,  d = min(decay, (1 + n) / (10 + n)) after n updates with warm-up, else decay

It starts at the first weights. It averages the optimiser's fp32 masters, not the weights that the model computes with:
in bf16 a step of 1 - .999 is below half a unit in the last place and the average would never move. A rank averages the
shards of its own optimiser, so that nothing is communicated and the cost is 4 bytes a trained element over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from bpgo_video.config.bpgo import EmaConfig
from bpgo_video.distributed.master_weights import MasterWeights, Shard


def decay_after(updates: int, config: EmaConfig) -> float:
    """What the average keeps of itself in the update after `updates` earlier ones."""
    return min(config.decay, (1 + updates) / (10 + updates)) if config.warmup else config.decay


class EMA:
    """The average of one engine's trained weights; every rank has one of its own shards."""

    def __init__(self, masters: MasterWeights, config: EmaConfig) -> None:
        self._masters, self._config = masters, config
        self._weights = masters.shards()
        self.shards = [replace(shard, values=shard.values.clone()) for shard in self._weights]
        self.updates = 0

    def update(self) -> None:
        """Take in the weights of an update that has just been made."""
        keep = decay_after(self.updates, self._config)
        self.updates += 1
        if self.shards:  # small models leave ranks without any
            torch._foreach_lerp_(_values(self.shards), _values(self._weights), 1 - keep)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Inside the block the model computes with the average, and behind it with its weights, bit for bit.

        Weights and average change places, which takes the memory of one shard more. All ranks enter and leave together,
        outside `Engine.whole_weights`; inside, nothing is updated or saved. Where the block raises, the run is over:
        the way back is a collective, in which ranks that did not raise would be missing.
        """
        self._exchange()
        yield
        self._exchange()

    def _exchange(self) -> None:
        for own, other in zip(_values(self.shards), _values(self._weights), strict=True):
            held = other.clone()
            other.copy_(own)
            own.copy_(held)
        self._masters.publish()


def _values(shards: Sequence[Shard]) -> list[Tensor]:
    return [shard.values for shard in shards]
