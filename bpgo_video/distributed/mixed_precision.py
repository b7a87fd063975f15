"""Parameters that stay in fp32 next to bf16 ones under ZeRO-3: at construction, and in DeepSpeed's optimizer.

DeepSpeed 0.19 gathers, reduces and saves each parameter in its shard's own dtype, but it builds models in one dtype and
lays all trained shards into one buffer. So the fp32 shards take the other dtype while the optimizer is built, and get
their values and dtype back right after. They must have parameter groups of their own (`optimiser_of` sees to that).
This file reads DeepSpeed's optimizer and imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError


def to_fp32(parameters: Iterable[Any]) -> None:
    """Give sharded parameters, just constructed, fp32 shards.

    Raises:
        ConfigError: the shards are on NVMe, where DeepSpeed keeps one dtype only.
    """
    for parameter in parameters:
        if parameter.nvme_swapper is not None:
            raise ConfigError(
                "the DeepSpeed JSON offloads parameters to NVMe in bf16, where DeepSpeed keeps one dtype only and this "
                "policy has parameters that stay in fp32; set zero_optimization.offload_param.device to 'cpu'"
            )
        _cast(parameter, torch.float32)


class LentShards:
    """The trained fp32 shards of a bf16 policy, in the other dtype from construction until `restore`."""

    def __init__(self, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._exact: dict[int, Tensor] = {}  # DeepSpeed's id -> values
        for parameter in every:
            if parameter.dtype != dtype:
                self._exact[parameter.ds_id] = parameter.ds_tensor.detach().clone()
                _cast(parameter, dtype)

    def restore(self, optimizer: Any) -> None:
        """Put the exact values into DeepSpeed's optimizer: into its masters, and into the shards that compute."""
        if not self._exact:
            return
        optimizer.checkpoint_event_prologue()  # shards every parameter; DeepSpeed keeps small ones whole in between
        for number, parameters in enumerate(optimizer.fp16_groups):
            if parameters[0].ds_id in self._exact:
                self._restore_group(optimizer, number, parameters)
        optimizer.checkpoint_event_epilogue()

    def _restore_group(self, optimizer: Any, number: int, parameters: list[Any]) -> None:
        lent = optimizer.fp16_partitioned_groups_flat[number]
        flat = torch.empty_like(lent, dtype=torch.float32, pin_memory=lent.is_pinned())
        shards = flat.split([parameter.ds_tensor.numel() for parameter in parameters])
        for parameter, shard in zip(parameters, shards, strict=True):
            shard.copy_(self._exact[parameter.ds_id])
            parameter.ds_tensor.data = shard
            parameter.data = parameter.data.float()
        optimizer.fp16_partitioned_groups_flat[number] = flat
        optimizer.fp32_partitioned_groups_flat[number].data.copy_(flat)


def _cast(parameter: Any, dtype: torch.dtype) -> None:
    """Another dtype for a parameter whose elements lie in its shard."""
    shard = parameter.ds_tensor
    pinned = shard.is_pinned()
    shard.data = shard.data.to(dtype)
    if pinned:
        shard.data = shard.data.pin_memory()
    parameter.data = parameter.data.to(dtype)
