"""The DeepSpeed JSON, completed with the recipe's settings; and the dtypes that it sets.

It names one dtype for a policy's transformers (`bf16`). Parameters have it, except those of modules that diffusers
keeps in fp32 (`_keep_in_fp32_modules`: Wan's time embedder, norms and modulation tables), as in the pipeline that users
sample with. Buffers, such as tables of positions, are never rounded. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.weights import headers, weight_files, without_weights


def compute_dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that the transformers compute in."""
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


def complete(ds_config: Mapping[str, Any], micro_batch_size: int = 1, max_grad_norm: float = 0.0) -> dict[str, Any]:
    """The JSON with the YAML's settings. `Engine` counts accumulation itself, since updates differ in length.

    `bf16` is removed: the tensors have their final dtypes when DeepSpeed receives them (below), and without
    the key DeepSpeed casts none, and reduces and accumulates gradients in fp32.

    `memory_efficient_linear` is off unless the JSON sets it. It replaces torch's linear in the whole process, reward
    models included, by one that rounds twice if there is a bias: in bf16, velocities would differ from the pipeline's.
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


LIVE_BLOCKS = 4  # whole at once: the one that computes, the one on its way, and those just used
FETCHING = {  # ZeRO-3's limits in elements: DeepSpeed's default, and blocks of the model
    "stage3_prefetch_bucket_size": (50_000_000, 1),
    "stage3_max_live_parameters": (1_000_000_000, LIVE_BLOCKS),
    "stage3_max_reuse_distance": (1_000_000_000, 1),
}


def fetching_ahead(ds_config: Mapping[str, Any], block: int) -> dict[str, Any]:
    """The JSON with those of ZeRO-3's limits that it leaves out, so that the next block is fetched while one computes.

    DeepSpeed fetches 5e7 elements ahead: a seventh of a block of Wan2.1-14B, so that most of a gather would be waited
    for. Each limit is DeepSpeed's default, or more if the model's blocks are larger.

    Args:
        block: elements of the largest part that is fetched as one.
    """
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return dict(ds_config)
    derived = {name: max(default, blocks * block) for name, (default, blocks) in FETCHING.items()}
    return {**ds_config, "zero_optimization": {**derived, **zero}}


class PrecisionError(RuntimeError):
    """A tensor does not have the recipe's dtype."""


def parameter_dtype(model_class: type, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a diffusers model's parameter `name` if the model computes in `dtype`."""
    kept = getattr(model_class, "_keep_in_fp32_modules", None) or ()
    return dtype if set(kept).isdisjoint(name.split(".")) else torch.float32


def check_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Check the dtype of every floating-point parameter, sharded or whole.

    Raises:
        PrecisionError: names the first tensor that differs, its dtype, and the dtype that it must have.
    """
    for name, parameter in module.named_parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", None)):  # ZeRO-3's shard
            if tensor is not None and tensor.is_floating_point():
                _check(module, "parameter", name, parameter_dtype(type(module), name, dtype), tensor.dtype)


def check_buffers(module: nn.Module, exact: Mapping[str, Tensor]) -> None:
    """Check that every buffer has the dtype of its exact value. Raises PrecisionError."""
    for name, buffer in module.named_buffers():
        _check(module, "buffer", name, exact[name].dtype, buffer.dtype)


def _check(module: nn.Module, kind: str, name: str, expected: torch.dtype, found: torch.dtype) -> None:
    if found != expected:
        raise PrecisionError(
            f"{kind} {name} of {type(module).__name__} is {found} and must be {expected}, by the recipe's precision "
            "(`bf16` in its DeepSpeed JSON): please report this with the versions of torch, deepspeed and diffusers"
        )


def tensor_files(folder: Path, model_class: Any) -> dict[str, Path]:
    """The safetensors file of a model folder that holds each tensor of a diffusers model.

    Tensors that the class ignores are left out: Wan 2.1's image-to-video folders have an unused `norm_added_q`.
    """
    found = {name: path for path in weight_files(folder) for name in headers([path])}
    if not found:
        raise FileNotFoundError(f"{folder} holds no .safetensors file; convert the weights to safetensors first")
    ignored = model_class._keys_to_ignore_on_load_unexpected or ()
    return {name: path for name, path in found.items() if not any(re.search(pattern, name) for pattern in ignored)}


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def model_buffers(model_class: Any, folder: Path, files: Mapping[str, Path]) -> dict[str, Tensor]:
    """A diffusers model's buffers by name, exact, on the CPU: computed by the model's code, or read from `files` if
    the model stores them.

    Args:
        files: `tensor_files` of the folder.
    """
    model = without_weights(model_class, folder)
    kept = files.keys() & model.state_dict()
    return {name: read_tensor(files[name], name) if name in kept else value for name, value in model.named_buffers()}


def finish_build(model: nn.Module, buffers: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Set the exact buffers, each on its device, and check the dtype of every tensor: the last step of a construction.

    DeepSpeed's construction of a sharded model rounds all numbers to the model's dtype, including those that positions
    are computed from: in bf16, cosines of rotary embeddings would be off by a tenth.
    """
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name].to(buffer.device)
    check_parameters(model, dtype)
    check_buffers(model, buffers)


# Under ZeRO-3, DeepSpeed 0.19 gathers, reduces and saves each parameter in its shard's own dtype, but it builds models
# in one dtype and flattens all trained shards into one buffer. So fp32 shards of a bf16 model are cast to bf16 while
# DeepSpeed builds its optimizer, and get their values and dtype back right after. `make_optimizer` gives them parameter
# groups of their own.


def keep_fp32(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the shards of a newly constructed model's fp32 parameters from `dtype` to fp32.

    Raises:
        ConfigError: the shards are on NVMe, where DeepSpeed keeps a single dtype.
    """
    named: list[tuple[str, Any]] = list(model.named_parameters())
    for parameter in [one for name, one in named if parameter_dtype(type(model), name, dtype) != dtype]:
        if parameter.nvme_swapper is not None:
            raise ConfigError(
                "the DeepSpeed JSON offloads parameters to NVMe in bf16, where DeepSpeed keeps a single dtype, but "
                "some parameters of this policy stay in fp32; set zero_optimization.offload_param.device to 'cpu'"
            )
        _cast(parameter, torch.float32)


def cast_shards(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> dict[int, Tensor]:
    """Cast all trained shards to `dtype`; the exact values of those that had another, for `restore_shards`."""
    exact: dict[int, Tensor] = {}  # by DeepSpeed's parameter id
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter.dtype != dtype:
            exact[parameter.ds_id] = parameter.ds_tensor.detach().clone()
            _cast(parameter, dtype)
    return exact


def restore_shards(optimizer: Any, exact: Mapping[int, Tensor]) -> None:
    """Write the exact fp32 values into the masters and the shards of DeepSpeed's ZeRO-3 optimizer."""
    if not exact:
        return
    optimizer.checkpoint_event_prologue()  # shards every parameter; DeepSpeed keeps small ones whole in between
    for number, parameters in enumerate(optimizer.fp16_groups):
        if parameters[0].ds_id not in exact:
            continue
        cast = optimizer.fp16_partitioned_groups_flat[number]
        flat = torch.empty_like(cast, dtype=torch.float32, pin_memory=cast.is_pinned())
        shards = flat.split([parameter.ds_tensor.numel() for parameter in parameters])
        for parameter, shard in zip(parameters, shards, strict=True):
            shard.copy_(exact[parameter.ds_id])
            parameter.ds_tensor.data = shard
            parameter.data = parameter.data.float()
        optimizer.fp16_partitioned_groups_flat[number] = flat
        optimizer.fp32_partitioned_groups_flat[number].data.copy_(flat)
    optimizer.checkpoint_event_epilogue()


def _cast(parameter: Any, dtype: torch.dtype) -> None:
    """Cast a sharded parameter and its shard."""
    shard = parameter.ds_tensor
    pinned = shard.is_pinned()
    shard.data = shard.data.to(dtype)
    if pinned:
        shard.data = shard.data.pin_memory()
    parameter.data = parameter.data.to(dtype)
