"""Which fp32 weights does this rank's optimiser hold, and how does the model come to compute with them?

ZeRO of every stage keeps one fp32 master of each trained element, on one rank; what the model computes with, perhaps in
bf16, is rounded from it after every update. This file reads the optimisers of DeepSpeed and imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float32
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError


@dataclass(frozen=True)
class Shard:
    """A run of the flattened elements of one trained parameter.

    Attributes:
        name, shape: of the whole parameter.
        start: index of the first element.
        values: the masters themselves, a view: writing to it is writing to the optimiser's weights.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Float32[Tensor, "elements"]


@runtime_checkable
class MasterWeights(Protocol):
    """What an average over updates needs of the engine."""

    def shards(self) -> list[Shard]:
        """This rank's part of the masters; together, all ranks' hold every trained element once."""
        ...

    def publish(self) -> None:
        """Make the model compute with what the masters hold now, rounded to its dtype; all ranks call it."""
        ...


@dataclass(frozen=True)
class ZeroMasters:
    """The masters in a DeepSpeed engine of stage 1, 2 or 3, on the device where the optimiser keeps them.

    Raises:
        ConfigError: they are on NVMe, from where DeepSpeed fetches them for its own step alone.
    """

    engine: Any
    stage: int

    def shards(self) -> list[Shard]:
        if self.engine.zero_nvme_offload_optimizer():
            raise ConfigError(
                "the DeepSpeed JSON offloads the optimiser to NVMe, where its weights can be neither averaged nor set; "
                "set zero_optimization.offload_optimizer.device to 'cpu', or ema.decay to 0"
            )
        found = _sharded_with_the_model if self.stage == 3 else _sharded_on_their_own
        return list(found(self.engine.module, self.engine.optimizer))

    def publish(self) -> None:
        optimizer = self.engine.optimizer
        if self.stage != 3:
            optimizer.update_lp_params()
            return
        optimizer.checkpoint_event_prologue()  # every parameter is parted again
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # and those that stay whole are gathered again


def _sharded_on_their_own(module: nn.Module, optimizer: Any) -> Iterator[Shard]:
    """Stages 1 and 2: all trained parameters, flattened one after the other, are cut into as many parts as ranks."""
    for name, parameter in _trained(module):
        mapping = parameter._hp_mapping
        if mapping is not None:  # else all of it is on other ranks
            yield Shard(name, tuple(parameter.shape), mapping.lp_fragment_address.start, mapping.hp_fragment.detach())


def _sharded_with_the_model(module: nn.Module, optimizer: Any) -> Iterator[Shard]:
    """Stage 3: each parameter is cut into equal parts, the last ones padded."""
    for name, parameter in _trained(module):
        group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = part * optimizer.dp_process_group.rank()
        count = min(part, parameter.ds_numel - start)
        if count > 0:
            masters = optimizer.fp32_partitioned_groups_flat[group]
            yield Shard(name, tuple(parameter.ds_shape), start, masters.detach().narrow(0, offset, count))


def _trained(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
