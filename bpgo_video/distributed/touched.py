"""Which transformers take part in an update? The others keep their weights, and their moments in the optimiser.

A pipeline's transformers compute at different noise levels, so that an update whose steps are all of one leaves the
other without a gradient. ZeRO takes that for a gradient of zero, by which AdamW would still move it, by momentum and
weight decay. This file reads the optimisers of DeepSpeed and imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bpgo_video.config.bpgo import ConfigError


def alternatives(module: nn.Module) -> list[nn.Module]:
    """The parts of which one at a time computes and that are trained; a module that is none of several is its own."""
    parts = list(module.values()) if isinstance(module, nn.ModuleDict) else [module]
    return [part for part in parts if any(parameter.requires_grad for parameter in part.parameters())]


class Touched:
    """The parts that an update has gradients of."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._parts, self._touched = parts, set[int]()
        for number, part in enumerate(parts):
            part.register_forward_pre_hook(partial(self._note, number))

    def _note(self, number: int, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._touched.add(number)

    def watch(self, engine: Any, stage: int) -> None:
        """Let the engine's optimiser step the groups that were touched alone.

        Raises:
            ConfigError: it cannot.
        """
        if len(self._parts) == 1:
            return
        if stage != 3 and engine.zero_cpu_offload():
            raise ConfigError(
                f"{len(self._parts)} transformers are trained under ZeRO {stage} with an offloaded optimizer, where "
                "DeepSpeed cannot step one alone; set zero_optimization.stage to 3, remove offload_optimizer, or set "
                "policy.trained to one of them"
            )
        step = engine.optimizer._optimizer_step
        part_of = [group["part"] for group in engine.optimizer.optimizer.param_groups]

        def step_if_touched(number: int) -> None:
            group = engine.optimizer.sub_group_to_group_id[number] if stage == 3 else number
            if part_of[group] in self._touched:
                step(number)

        engine.optimizer._optimizer_step = step_if_touched

    def before_step(self, engine: Any, stage: int) -> None:
        """Offloading hands the optimiser the gradients of the last pass alone: those of earlier ones, too."""
        if stage == 3 and len(self._parts) > 1 and engine.optimizer.offload_optimizer:
            engine.optimizer.finalize_gradient_accumulation_boundary()

    def after_step(self, engine: Any, stage: int) -> None:
        """The next update begins; what ZeRO-3 keeps of this one's gradients would be added to those of a later pass."""
        self._touched.clear()
        if stage == 3 and len(self._parts) > 1:
            engine.optimizer.grad_partitions_flat_buffer.zero_()
