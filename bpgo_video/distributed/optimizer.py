"""The optimizer: parameter groups, learning-rate schedule, which transformers an update steps, and the fp32 masters.

This file reads DeepSpeed's optimizers without importing DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.run import OptimizerConfig

SCHEDULES: dict[str, Callable[[float], float]] = {  # progress in [0, 1] after the warm-up -> factor
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's averages of the gradient and of its square


def learning_rate_factor(name: str, warmup_updates: int, total_updates: int) -> Callable[[int], float]:
    """update -> learning-rate factor: (update + 1)/warmup_updates during the warm-up, then SCHEDULES[name]."""

    def factor(update: int) -> float:
        if update < warmup_updates:
            return (update + 1) / warmup_updates
        return SCHEDULES[name](min(1.0, (update - warmup_updates) / max(1, total_updates - warmup_updates)))

    return factor


def make_optimizer(parts: Sequence[nn.Module], optim: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's optimizer with one parameter group per part and dtype; DeepSpeed flattens each group into one buffer.

    Each group names the index of its part as `part`. A part's narrowest dtype comes first, since DeepSpeed takes the
    first parameter's dtype for the model's.
    """
    groups = []
    for number, part in enumerate(parts):
        trained = sorted((p for p in part.parameters() if p.requires_grad), key=lambda p: p.dtype.itemsize)
        for _, parameters in groupby(trained, key=lambda p: p.dtype):
            groups.append({"params": list(parameters), "part": number})
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.learning_rate, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(
        groups,
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,  # one pass over memory, on a GPU and on a CPU (offload)
    )


def trained_parts(module: nn.Module) -> list[nn.Module]:
    """The trained transformers of an `nn.ModuleDict`, of which one computes at a time; or the module itself."""
    parts = list(module.values()) if isinstance(module, nn.ModuleDict) else [module]
    return [part for part in parts if any(parameter.requires_grad for parameter in part.parameters())]


class TouchedParts:
    """Restricts each update to the parts that ran with gradients since the last one.

    A pipeline's transformers compute at different noise levels, so an update may have gradients of one alone. ZeRO
    treats the missing gradients as zeros, with which AdamW would still move the other transformer, by momentum and
    weight decay.

    Args:
        parts: `trained_parts` of the engine's module.
        stage: of ZeRO.
    """

    def __init__(self, parts: Sequence[nn.Module], stage: int) -> None:
        self._parts, self._stage, self._touched = parts, stage, set[int]()
        for number, part in enumerate(parts):
            part.register_forward_pre_hook(partial(self._note, number))

    def _note(self, number: int, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._touched.add(number)

    def attach(self, engine: Any) -> None:
        """Make the DeepSpeed engine's optimizer step only the groups of touched parts.

        Raises:
            ConfigError: it cannot.
        """
        if len(self._parts) == 1:
            return
        if self._stage != 3 and engine.zero_cpu_offload():
            raise ConfigError(
                f"{len(self._parts)} transformers are trained under ZeRO {self._stage} with an offloaded optimizer, "
                "where DeepSpeed cannot step one alone; set zero_optimization.stage to 3, remove offload_optimizer, or "
                "set policy.trained to one of them"
            )
        step = engine.optimizer._optimizer_step
        part_of = [group["part"] for group in engine.optimizer.optimizer.param_groups]

        def step_if_touched(number: int) -> None:
            group = engine.optimizer.sub_group_to_group_id[number] if self._stage == 3 else number
            if part_of[group] in self._touched:
                step(number)

        engine.optimizer._optimizer_step = step_if_touched

    def before_step(self, engine: Any) -> None:
        """Add the gradients of earlier passes, since an offloaded optimizer receives only the last pass's."""
        if self._stage == 3 and len(self._parts) > 1 and engine.optimizer.offload_optimizer:
            engine.optimizer.finalize_gradient_accumulation_boundary()

    def after_step(self, engine: Any) -> None:
        """Start the next update; ZeRO-3 would otherwise add this update's gradients to a later pass."""
        self._touched.clear()
        if self._stage == 3 and len(self._parts) > 1:
            engine.optimizer.grad_partitions_flat_buffer.zero_()


@dataclass(frozen=True)
class Shard:
    """Consecutive elements of a flattened trained parameter.

    Attributes:
        name, shape: of the whole parameter.
        start: index of the first element.
        values: [elements], fp32. In `ZeroMasters` a view of the optimizer's weights: writing to it changes them.
        group, offset: which of the optimizer's vectors holds the elements, and from where.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Float32[Tensor, "elements"]
    group: int = 0
    offset: int = 0


@runtime_checkable
class SavedMoment(Protocol):
    """A moment in a checkpoint; see `zero_files.ZeroParameters`."""

    updates: dict[str, float]

    def load_into(self, shard: Shard) -> None: ...


Place = tuple[tuple[int, ...], int, int, int, int]  # shape, first element; group, offset in its vector, count


class ZeroMasters:
    """The fp32 master weights in a DeepSpeed engine's optimizer, on whichever device it keeps them.

    Every ZeRO stage keeps one master of each trained element, on one rank. The weights that the model computes with are
    rounded from the masters after every update.

    Attributes:
        before_change: called before an update, and before others set the masters.
    """

    before_change: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, engine: Any, stage: int) -> None:
        self._engine, self._stage = engine, stage

    def shards(self) -> list[Shard]:
        """This rank's masters. The shards of all ranks hold every trained element once.

        Raises:
            ConfigError: the masters are on NVMe, from where DeepSpeed fetches them only for its own step.
        """
        if self._engine.zero_nvme_offload_optimizer():
            raise ConfigError(
                "the DeepSpeed JSON offloads the optimizer to NVMe, where its weights can be neither averaged nor set; "
                "set zero_optimization.offload_optimizer.device to 'cpu', or ema.decay and loss.old_decay to 0"
            )
        locate = self._locate_zero3 if self._stage == 3 else self._locate_zero12
        trained = [(name, p) for name, p in self._engine.module.named_parameters() if p.requires_grad]
        located = [(name, *place) for name, p in trained for place in [locate(p)] if place is not None]
        return [
            Shard(name, shape, start, self._vectors[group].detach().narrow(0, offset, count), group, offset)
            for name, shape, start, group, offset, count in located
        ]

    @property
    def _vectors(self) -> list[Tensor]:
        """The optimizer's flat fp32 weights on this rank, one vector per group."""
        optimizer = self._engine.optimizer
        found: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return found

    def _locate_zero12(self, parameter: Any) -> Place | None:
        """ZeRO 1 and 2 flatten a group's parameters into one vector, and cut it into one part per rank."""
        mapping = parameter._hp_mapping
        if mapping is None:  # all elements are on other ranks
            return None
        group, fragment = self._groups[id(parameter)], mapping.hp_fragment_address
        return tuple(parameter.shape), mapping.lp_fragment_address.start, group, fragment.start, fragment.numel

    @cached_property
    def _groups(self) -> dict[int, int]:
        """Under ZeRO 1 and 2, the group of each trained parameter, by its identity."""
        groups = enumerate(self._engine.optimizer.bit16_groups)
        return {id(parameter): number for number, parameters in groups for parameter in parameters}

    def _locate_zero3(self, parameter: Any) -> Place | None:
        """ZeRO 3 cuts every parameter into equal parts, and pads the last ones."""
        optimizer = self._engine.optimizer
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = length * optimizer.dp_process_group.rank()
        count = min(length, parameter.ds_numel - start)
        return (tuple(parameter.ds_shape), start, group, offset, count) if count > 0 else None

    def continue_moments(self, saved: Mapping[str, SavedMoment]) -> None:
        """Set AdamW's moments, by their names in `MOMENTS`, and its numbers of updates; padding stays 0.

        Raises:
            ConfigError, CheckpointError: see `shards` and `SavedMoment.load_into`.
        """
        shards, adam = self.shards(), self._engine.optimizer.optimizer.state
        for group, vector in enumerate(self._vectors):
            mine = [shard for shard in shards if shard.group == group]
            state = adam[vector] = {"step": torch.zeros((), device=vector.device)}  # as torch's fused AdamW makes it
            for name, moment in saved.items():
                state[name] = torch.zeros_like(vector)
                for shard in mine:
                    moment.load_into(replace(shard, values=state[name].narrow(0, shard.offset, shard.values.numel())))
                    state["step"].fill_(moment.updates[shard.name])

    def publish(self) -> None:
        """Round the masters into the weights that the model computes with. Collective."""
        optimizer = self._engine.optimizer
        if self._stage != 3:
            optimizer.update_lp_params()
            return
        optimizer.checkpoint_event_prologue()  # shards every parameter
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gathers the small ones that DeepSpeed keeps whole
