"""Whole weights and whole gradients under ZeRO-3, for as long as they fit: fewer hooks, and fewer collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from more_itertools import constrained_batches
from torch import Tensor

from bpgo_video.distributed.memory import fits_everywhere, peak_growth
from bpgo_video.distributed.mesh import Mesh

GATHERED_AT_ONCE = 500_000_000  # elements per collective, of which DeepSpeed needs twice the memory


def missing_bytes(engine: Any) -> int:
    """Bytes of the weights that this rank does not hold; 0 below ZeRO-3."""
    sharded = [parameter for parameter in engine.module.parameters() if hasattr(parameter, "ds_numel")]
    return sum((p.ds_numel - p.ds_tensor.numel()) * p.element_size() for p in sharded)


def not_gathered() -> AbstractContextManager[bool]:
    """A block in which ZeRO-3 fetches each block of the model as it runs."""
    return nullcontext(False)


@contextmanager
def whole_weights(engine: Any) -> Iterator[None]:
    """All weights of a ZeRO-3 engine on every rank inside the block, so that forwards and backwards fetch none.

    All ranks enter and leave together; inside, they may run different numbers of forwards.
    """
    every: list[Any] = list(engine.module.parameters())
    sharded = [parameter for parameter in every if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    # `GatheredParameters` alone would gather each parameter with a collective of its own.
    for batch in constrained_batches(sharded, GATHERED_AT_ONCE, get_len=lambda p: p.ds_numel, strict=False):
        batch[0].all_gather_coalesced(list(batch)).wait()
    with deepspeed.zero.GatheredParameters(every), without_fetching(engine):
        yield


@contextmanager
def without_fetching(engine: Any) -> Iterator[None]:
    """The hooks by which ZeRO-3 fetches and frees weights are off inside the block; they compare ranks, too.

    DeepSpeed's `unwrap_model_for_generation` keeps those of the whole model, and makes all others again every time.
    """
    fetching = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    handles = [*fetching.forward_hooks, *fetching.backward_hooks, fetching.fwd_pre_hook]
    handles += [engine.module_forward_pre_hook, engine.module_forward_post_hook]
    off = [(handle, handle.hooks_dict_ref().pop(handle.id)) for handle in sorted(handles, key=lambda one: one.id)]
    try:
        yield
    finally:
        for handle, hook in off:
            handle.hooks_dict_ref()[handle.id] = hook


class WhenGathered:
    """Decides, each time on all ranks alike, whether ZeRO-3 gathers all weights.

    `auto` gathers if the weights that are missing take at most half of the free memory of every rank. With `measures`
    it also leaves room for what the work took the first time, when nothing was gathered; only GPUs can be measured.

    Args:
        setting: `auto`, `gathered` or `sharded`.
    """

    def __init__(self, setting: str, engine: Any, mesh: Mesh, *, measures: bool = False) -> None:
        self._setting, self._engine, self._mesh = setting, engine, mesh
        self._work = None if measures and mesh.device.type == "cuda" else 0

    @contextmanager
    def __call__(self) -> Iterator[bool]:
        """The block of the work; whether weights are gathered in it."""
        if self._setting != "auto":
            gathers = self._setting == "gathered"
        else:
            gathers = self._work is not None and fits_everywhere(missing_bytes(self._engine), self._mesh, self._work)
        if gathers:
            with whole_weights(self._engine):
                yield True
        elif self._work is None:
            with peak_growth(self._mesh.device) as measured:
                yield False
            self._work = measured.bytes
        else:
            yield False


class WholeGradients:
    """The sum of a rank's gradients over the micro-batches of an update, in fp32, averaged over the ranks once.

    DeepSpeed calls `reduce_ready_partitions_and_remove_grads` for each parameter whose gradient is complete, and would
    average it over the ranks then. Weights must be gathered until `average` returns.

    Args:
        optimizer: DeepSpeed's, of ZeRO-3.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._average = optimizer, optimizer.reduce_ready_partitions_and_remove_grads
        self._sums: dict[Any, Tensor] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Gradients of backwards in this block are added up."""
        self._optimizer.reduce_ready_partitions_and_remove_grads = self._add
        try:
            yield
        finally:
            self._optimizer.reduce_ready_partitions_and_remove_grads = self._average

    def _add(self, parameter: Any) -> None:
        gradient, parameter.grad = parameter.grad, None
        if parameter in self._sums:
            self._sums[parameter].add_(gradient)
        else:
            self._sums[parameter] = gradient.float()

    @torch.no_grad()
    def average(self) -> None:
        """Average the sums over the ranks into the shards that DeepSpeed's next step reads. Collective."""
        optimizer = self._optimizer
        optimizer.micro_step_id = 0  # the shards are set, not added to
        for parameter in (parameter for group in optimizer.fp16_groups for parameter in group):
            if parameter in self._sums:
                parameter.grad = torch.empty_like(parameter)
                parameter.grad.data = self._sums.pop(parameter)  # fp32, whatever the parameter's dtype
                self._average(parameter)
        optimizer.independent_gradient_partition_epilogue()
