"""How does training run on DeepSpeed? The only file that runs it: start, build, backward, step, save, load."""

from __future__ import annotations

import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import unwrap_model_for_generation
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_modules
from more_itertools import constrained_batches
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.run import OptimiserConfig
from bpgo_video.distributed.block_calls import call_by_position
from bpgo_video.distributed.master_weights import ZeroMasters
from bpgo_video.distributed.mesh import TIMEOUT, Mesh
from bpgo_video.distributed.mixed_precision import LentShards, to_fp32
from bpgo_video.distributed.model_buffers import finish_build, model_buffers
from bpgo_video.distributed.optimiser import optimiser_of
from bpgo_video.distributed.precision import check_parameters, kept_in_fp32
from bpgo_video.distributed.stored_tensors import stored, tensor_files
from bpgo_video.distributed.touched import Touched, alternatives
from bpgo_video.launching import free_port

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", r"`torch.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's own calls

GATHERED_AT_ONCE = 500_000_000  # elements, which DeepSpeed holds twice while they come together
OWNED_BY_YAML = {
    "train_batch_size": "rollout, or sft.batch_size,",
    "train_micro_batch_size_per_gpu": "rollout.micro_batch_size, or sft.micro_batch_size,",
    "gradient_accumulation_steps": "optim.updates_per_rollout, or sft.batch_size,",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
}


def read_ds_config(path: str) -> dict[str, Any]:
    """ZeRO, precision and offload from a DeepSpeed JSON.

    Raises:
        ConfigError: no such file, no JSON, fp16, or a key that has its home in the YAML.
    """
    if not Path(path).is_file():
        raise ConfigError(f"deepspeed: {path!r} does not exist; ds_configs/ has zero1.json, zero2.json, zero3.json ...")
    try:
        ds_config = json.loads(Path(path).read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed: {path} is not JSON: {error}") from None
    for key, home in OWNED_BY_YAML.items():
        if key in ds_config:
            raise ConfigError(f"{path} sets {key!r}, which is set by {home} in the YAML; remove it from the JSON")
    if zero_stage(ds_config) not in (1, 2, 3):
        absent = "" if "zero_optimization" in ds_config else " (it has no zero_optimization)"
        raise ConfigError(f"{path}: zero_optimization.stage is {zero_stage(ds_config)}{absent}; it must be 1, 2 or 3")
    if ds_config.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{path} enables fp16, whose range is too small for log-probs; use bf16 or fp32")
    own = [key for key in ("data_types", "communication_data_type", "torch_autocast") if key in ds_config]
    own += [f"bf16.{key}" for key in ds_config.get("bf16", {}) if key != "enabled"]
    if own:
        raise ConfigError(
            f"{path} sets {own[0]!r}, but precision has one switch, bf16.enabled: it makes weights bf16; masters and "
            f"reduced gradients are always fp32. Remove {own[0]!r} from the JSON"
        )
    return ds_config


def require_supported(ds_config: Mapping[str, Any]) -> None:
    """Check that the accelerator computes in the JSON's precision.

    Raises:
        ConfigError: it has no bf16.
    """
    device = get_accelerator()
    if compute_dtype(ds_config) == torch.bfloat16 and not device.is_bf16_supported():
        raise ConfigError(
            f"the DeepSpeed JSON enables bf16, which this {device.device_name()} does not support; use a JSON without "
            "bf16, such as ds_configs/zero3.json"
        )


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def zero_settings(ds_config: Mapping[str, Any]) -> DeepSpeedZeroConfig:
    """What the JSON says of ZeRO, with DeepSpeed's own defaults for the rest."""
    return DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))


def compute_dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


def start_ranks(timeout: timedelta = TIMEOUT) -> Mesh:
    """Join the process group that the launcher describes, or be the only rank where there is none.

    Raises:
        ConfigError: the launcher's port is in use, or this process would train next to others without knowing them.
    """
    if "RANK" not in os.environ:
        refuse_lone_tasks()
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:  # without it, init_distributed compiles a shared-memory operator that nothing here needs
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} is in use by another process of {socket.gethostname()}, and rank 0 must "
            "listen on it; pass a free one to the launcher (deepspeed --master_port N), or start ranks with "
            "bpgo-video ... --ranks N, which finds one"
        ) from error
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Mesh(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), device=device)


def refuse_lone_tasks() -> None:
    """A process that srun or mpirun started beside others, and DeepSpeed's launcher did not, would train alone.

    Raises:
        ConfigError: names the variable that tells, and the way out.
    """
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name, "1")) > 1:
            raise ConfigError(
                f"{name} is {os.environ[name]}, but RANK is not set: each of these processes would train alone; "
                "start `deepspeed --no_ssh --node_rank N ...` once on every node, as docs/multi_node.md shows"
            )


def stop_ranks() -> None:
    """Leave the process group; to be called where the run ended well on every rank."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def build_sharded(ds_config: Mapping[str, Any], model_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A diffusers model that is born sharded (ZeRO-3) and filled tensor by tensor from its safetensors.

    No rank ever holds more than its shard and the one tensor at hand; rank 0 reads the file and broadcasts. Buffers are
    whole on every rank, and exact.

    Raises:
        PrecisionError: a tensor has another dtype than `bpgo_video.distributed.precision` states.
    """
    # Init's own argument `dtype` gives way to what the accelerator supports (DeepSpeed 0.19.8); its config does not.
    precision = {"bf16": {"enabled": dtype == torch.bfloat16}}
    with deepspeed.zero.Init(config_dict_or_path=_complete(ds_config, 1, 0.0) | precision):
        model = model_class.from_config(model_class.load_config(folder))
    to_fp32(parameter for _, parameter in kept_in_fp32(model, dtype))
    where = tensor_files(folder, model_class)
    named, buffers = dict(model.named_parameters()), model_buffers(model_class, folder, where)
    missing, foreign = sorted(set(named) - set(where)), sorted(set(where) - set(named) - set(buffers))
    if missing or foreign:
        raise ValueError(f"{folder}: weights do not fit the config; missing {missing[:3]}, unknown {foreign[:3]}")
    reads_file = torch.distributed.get_rank() == 0
    for name, parameter in named.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if reads_file:
                parameter.data.copy_(stored(where[name], name))
    finish_build(model, buffers, dtype)
    return model


def _complete(ds_config: Mapping[str, Any], micro_batch_size: int, max_grad_norm: float) -> dict[str, Any]:
    """The JSON with what the YAML says; accumulation is counted by us, since updates differ in length.

    The JSON's `bf16` is left out. The tensors have their dtypes when DeepSpeed receives them (`precision.py`), and
    it casts none. Without the key it reduces and accumulates gradients in fp32.

    `memory_efficient_linear` is off unless the JSON sets it: it replaces torch's linear in the whole process, reward
    models included, by one that rounds twice where there is a bias. In bf16 velocities then differ from the pipeline's.
    """
    return {
        **{key: value for key, value in ds_config.items() if key != "bf16"},
        "zero_optimization": {"memory_efficient_linear": False, **ds_config.get("zero_optimization", {})},
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def elements_of(parameter: Any) -> int:
    """Of a sharded parameter, on all ranks together."""
    return int(parameter.ds_numel)


def frozen(module: nn.Module, ds_config: Mapping[str, Any]) -> Any:
    """A module that is used and never trained: under ZeRO-3 sharded, fetching as it goes, else whole."""
    if zero_stage(ds_config) != 3:
        return module
    return deepspeed.initialize(model=module, config=_complete(ds_config, 1, 0.0))[0]


class Engine:
    """One trained module under DeepSpeed.

    Gradients are averaged over the ranks: a caller divides its losses so that their sum over one rank's micro-batches
    of an update is that rank's mean.

    Attributes:
        after_update: called after each update, such as `EMA.update`.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimiserConfig,
        ds_config: Mapping[str, Any],
        *,
        micro_batch_size: int,
        learning_rate_factor: Callable[[int], float],
        block_classes: tuple[type[nn.Module], ...],
    ):
        self.stage, self.dtype = zero_stage(ds_config), compute_dtype(ds_config)
        self.remembers = optim.name != "sgd"  # whether the optimiser has a state
        self.trains_all = all(parameter.requires_grad for parameter in module.parameters())
        if self.stage == 3:  # a block is fetched as one unit: fewer hooks, fewer and larger gathers
            set_z3_leaf_modules(module, list(block_classes))
            call_by_position(module, block_classes)
        parts = alternatives(module)
        optimizer, self._touched = optimiser_of(parts, optim), Touched(parts)
        lent = LentShards(optimizer, self.dtype) if self.stage == 3 else None
        self.wrapped, _, _, self.schedule = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor),
            config=_complete(ds_config, micro_batch_size, optim.max_grad_norm),
        )
        if lent is not None:
            lent.restore(self.wrapped.optimizer)
        for transformer in module.values() if isinstance(module, nn.ModuleDict) else [module]:
            check_parameters(transformer, self.dtype)
        self._touched.watch(self.wrapped, self.stage)
        self.after_update: Callable[[], None] | None = None

    @property
    def module(self) -> nn.Module:
        return self.wrapped.module

    @property
    def masters(self) -> ZeroMasters:
        return ZeroMasters(self.wrapped, self.stage)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate a micro-batch's gradient; `last` closes the update, after which `step` is due."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        self.wrapped.backward(loss)

    def step(self) -> float:
        """One optimiser update; the gradient's norm before clipping.

        Raises:
            FloatingPointError: the gradient is not finite; weights in memory are corrupted, checkpoints are not.
        """
        self._touched.before_step(self.wrapped, self.stage)
        self.wrapped.step()
        self._touched.after_step(self.wrapped, self.stage)
        norm = self.wrapped.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        if norm != norm or norm == float("inf"):
            raise FloatingPointError(
                f"gradient norm is {norm}; the last checkpoint is intact: lower the learning rate "
                "or look at this step's inputs, and at the records before it in metrics.jsonl"
            )
        if self.after_update is not None:
            self.after_update()
        return norm

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Whole parameters for reading inside the block, where ZeRO-3 shards them."""
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            yield

    @property
    def missing_bytes(self) -> int:
        """Of the module's weights, what this rank does not hold."""
        sharded = [parameter for parameter in self.module.parameters() if hasattr(parameter, "ds_numel")]
        return sum((p.ds_numel - p.ds_tensor.numel()) * p.element_size() for p in sharded)  # type: ignore[attr-defined]

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """All weights on every rank inside the block, where ZeRO-3 shards them: forwards fetch nothing.

        Ranks may run different numbers of forwards inside; all of them enter and leave together.
        """
        if self.stage != 3:
            yield
            return
        every: list[Any] = list(self.module.parameters())
        sharded = [parameter for parameter in every if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        # One collective for each run: `unwrap_model_for_generation` would take one for each parameter.
        for run in constrained_batches(sharded, GATHERED_AT_ONCE, get_len=elements_of, strict=False):
            run[0].all_gather_coalesced(list(run)).wait()
        with unwrap_model_for_generation(self.wrapped):
            yield

    def save(self, folder: Path, tag: str, state: Mapping[str, Any]) -> None:
        """Every rank writes its part into folder/tag; `state` comes back from `load`."""
        self.wrapped.save_checkpoint(
            str(folder),
            tag,
            client_state=dict(state),
            save_latest=False,
            exclude_frozen_parameters=not self.trains_all,
        )

    def load(self, folder: Path, tag: str, universal: bool = False) -> dict[str, Any]:
        """Continue from what `save` wrote, on the same number of ranks, or from universal files; its `state`."""
        self.wrapped._config.load_universal_checkpoint = universal
        path, state = self.wrapped.load_checkpoint(str(folder), tag, load_module_strict=self.trains_all)
        self.wrapped._config.load_universal_checkpoint = False
        if path is None:
            raise FileNotFoundError(f"DeepSpeed found no checkpoint {tag!r} in {folder}")
        return state

    def continue_schedule(self, state: dict[str, Any]) -> None:
        """Go on in the learning-rate schedule from its state, without the optimiser's."""
        self.schedule.load_state_dict(state)
        for group, rate in zip(self.schedule.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
