"""The DeepSpeed engine: run backward and step, save and load.

DeepSpeed runs only here and in `gathering.py`, `process_group.py` and `sharded_build.py`; `zero_files.py` reads what it
writes.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import set_z3_leaf_modules
from pydantic import ValidationError
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.deepspeed import zero_stage
from bpgo_video.config.run import OptimizerConfig
from bpgo_video.distributed.ds_config import (
    cast_shards,
    check_parameters,
    complete,
    compute_dtype,
    fetching_ahead,
    restore_shards,
)
from bpgo_video.distributed.gathering import WholeGradients, not_gathered, whole_weights
from bpgo_video.distributed.manifest import write_file
from bpgo_video.distributed.optimizer import TouchedParts, ZeroMasters, make_optimizer, trained_parts
from bpgo_video.distributed.snapshot import Sink
from bpgo_video.distributed.zero_files import read_file
from bpgo_video.documents import wrong_value

warnings.filterwarnings("ignore", r"`torch.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's own calls


def require_supported(ds_config: Mapping[str, Any]) -> None:
    """Check that DeepSpeed accepts the JSON, and that the accelerator supports its precision.

    Raises:
        ConfigError: a setting has a wrong type or value, or the accelerator has no bf16.
    """
    zero_settings(ds_config)
    try:
        DeepSpeedConfig(complete(ds_config))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:  # DeepSpeed's, of wrong types
        reason = " ".join(str(error).split())
        raise ConfigError(f"the DeepSpeed JSON has a wrong value: {reason}; ds_configs/ has examples") from None
    device = get_accelerator()
    if compute_dtype(ds_config) == torch.bfloat16 and not device.is_bf16_supported():
        raise ConfigError(
            f"the DeepSpeed JSON enables bf16, which this {device.device_name()} does not support; use a JSON without "
            "bf16, such as ds_configs/zero3.json"
        )


def zero_settings(ds_config: Mapping[str, Any]) -> DeepSpeedZeroConfig:
    """The JSON's ZeRO settings, with DeepSpeed's defaults for the rest. Raises ConfigError for what it refuses."""
    settings = ds_config.get("zero_optimization", {})
    try:
        return DeepSpeedZeroConfig(**settings)
    except ValidationError as error:
        raise ConfigError(f"zero_optimization of the DeepSpeed JSON: {wrong_value(error)}; correct it") from None


def frozen(module: nn.Module, ds_config: Mapping[str, Any]) -> Any:
    """A module for inference only: sharded under ZeRO-3, which gathers each block as it runs; else whole."""
    return deepspeed.initialize(model=module, config=complete(ds_config))[0] if zero_stage(ds_config) == 3 else module


def largest_block(module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> int:
    """Elements of the largest block, sharded or whole."""
    blocks = [block for block in module.modules() if isinstance(block, block_classes)]
    return max(sum(getattr(p, "ds_numel", p.numel()) for p in block.parameters()) for block in blocks)


def call_by_position(module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
    """Pass the inputs of every block of these classes by position; call it before DeepSpeed adds its hooks.

    ZeRO-3 frees a block's weights in backward once the gradients of its positional inputs are there. A block called by
    keyword has none: its weights would be freed before its own backward, which then fails.
    """

    def by_position(signature: inspect.Signature, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs:
            bound = signature.bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
        return args, kwargs

    for block in module.modules():
        if isinstance(block, block_classes):
            block.register_forward_pre_hook(partial(by_position, inspect.signature(block.forward)), with_kwargs=True)


class _Files(TorchCheckpointEngine):
    """How DeepSpeed writes and reads the files of a checkpoint; reading runs no code."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink

    def save(self, state_dict: Any, path: str) -> None:
        self._sink(state_dict, Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        return read_file(Path(path), mapped=False)


class Engine:
    """One trained module under DeepSpeed.

    Gradients are averaged over the ranks. So a caller scales its losses such that their sum over one rank's
    micro-batches of an update is that rank's mean.

    Attributes:
        module: the module itself; `wrapped` is DeepSpeed's wrapper, which runs forwards.
        stage, dtype: of ZeRO, and that the module computes in.
        has_optimizer_state: SGD has none.
        trains_all: whether no parameter is frozen.
        masters: the fp32 weights of this rank.
        after_update: called after each update, for example `EMA.update`.
        gathers: the block around an update's replay; whether all weights are gathered in it (`WhenGathered`).
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimizerConfig,
        ds_config: Mapping[str, Any],
        *,
        micro_batch_size: int,
        learning_rate_factor: Callable[[int], float],
        block_classes: tuple[type[nn.Module], ...],
    ):
        self.module, self.stage, self.dtype = module, zero_stage(ds_config), compute_dtype(ds_config)
        self.has_optimizer_state = optim.name != "sgd"
        self.trains_all = all(parameter.requires_grad for parameter in module.parameters())
        self.after_update: Callable[[], None] | None = None
        self.gathers: Callable[[], AbstractContextManager[bool]] = not_gathered
        self._averages_once = self.stage == 3 and optim.average == "update"
        if self.stage == 3:  # each block is gathered as one unit: fewer hooks, fewer and larger collectives
            set_z3_leaf_modules(module, list(block_classes))
            call_by_position(module, block_classes)
        parts = trained_parts(module)
        self._touched, optimizer = TouchedParts(parts, self.stage), make_optimizer(parts, optim)
        exact = cast_shards(optimizer, self.dtype) if self.stage == 3 else {}
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
        ahead = fetching_ahead(ds_config, largest_block(module, block_classes))
        config = complete(ahead, micro_batch_size, optim.max_grad_norm)
        self.wrapped = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=self.schedule, config=config
        )[0]
        restore_shards(self.wrapped.optimizer, exact)
        for transformer in module.values() if isinstance(module, nn.ModuleDict) else [module]:
            check_parameters(transformer, self.dtype)
        self._touched.attach(self.wrapped)
        self.wrapped.optimizer.check_grad_overflow = True  # otherwise ZeRO 1 and 2 apply a gradient of inf in bf16
        self._skipped, self._max_skipped = 0, optim.max_skipped
        self.masters = ZeroMasters(self.wrapped, self.stage)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate a micro-batch's gradient; `last` marks the update's last one, after which `step` must follow."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        self.wrapped.backward(loss)

    def step(self) -> float:
        """One optimizer update; the gradient's norm before clipping, over all ranks.

        A gradient that is not finite updates nothing: weights, moments and schedule stay as they are. Its norm is inf.

        Raises:
            FloatingPointError: that many updates in a row were skipped; see `optim.max_skipped`.
        """
        self.masters.before_change()
        self._touched.before_step(self.wrapped)
        self.wrapped.step()
        self._touched.after_step(self.wrapped)
        norm = float(self.wrapped.get_global_grad_norm())
        if math.isfinite(norm):
            self._skipped = 0
            if self.after_update is not None:
                self.after_update()
            return norm
        if self.stage != 3:  # with an offloaded optimizer in bf16, DeepSpeed would add the next gradient to this one
            gradients = self.wrapped.optimizer.averaged_gradients
            gradients.update(dict.fromkeys(gradients))
        self._skipped += 1
        if self._skipped > self._max_skipped:
            raise FloatingPointError(
                f"the gradient was not finite in {self._skipped} updates in a row, more than optim.max_skipped allows "
                f"({self._max_skipped}); none of them changed the weights, and the last checkpoint is intact: lower "
                "the learning rate, or check this step's inputs and the records before it in metrics.jsonl"
            )
        return math.inf

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Whole parameters inside the block, for reading."""
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """The block in which the micro-batches of an update run forward and backward; `step` follows it.

        All ranks enter and leave together. Under ZeRO-3 all weights may be gathered inside, see `gathers`.
        """
        with self.gathers() as gathered:
            if not (gathered and self._averages_once):
                yield
                return
            gradients = WholeGradients(self.wrapped.optimizer)
            with gradients.collecting():
                yield
            gradients.average()

    def whole_weights(self) -> AbstractContextManager[None]:
        """The block in which every rank holds all weights, see `gathering.whole_weights`."""
        return whole_weights(self.wrapped) if self.stage == 3 else nullcontext()

    def save(self, folder: Path, tag: str, state: Mapping[str, Any], sink: Sink = write_file) -> None:
        """Pass this rank's files of folder/tag to `sink`, with `state`, which `load` returns. Collective."""
        self.wrapped.checkpoint_engine = _Files(sink)
        self.wrapped.save_checkpoint(
            str(folder), tag, dict(state), save_latest=False, exclude_frozen_parameters=not self.trains_all
        )

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Continue from the files of as many ranks under the same stage; the saved `state`. Collective."""
        self.wrapped.checkpoint_engine = _Files(write_file)
        path, state = self.wrapped.load_checkpoint(str(folder), tag, load_module_strict=self.trains_all)
        if path is None:
            raise FileNotFoundError(f"DeepSpeed found no checkpoint {tag!r} in {folder}")
        return state

    def continue_schedule(self, state: dict[str, Any]) -> None:
        """Restore the learning-rate schedule's state alone, without the optimizer's."""
        self.schedule.load_state_dict(state)
        for group, rate in zip(self.schedule.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
