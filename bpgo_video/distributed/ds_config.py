"""The DeepSpeed JSON: read, validated, and completed with the recipe's settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bpgo_video.config.bpgo import ConfigError

SET_BY_YAML = {
    "train_batch_size": "rollout, or sft.batch_size,",
    "train_micro_batch_size_per_gpu": "rollout.micro_batch_size, or sft.micro_batch_size,",
    "gradient_accumulation_steps": "optim.updates_per_rollout, or sft.batch_size,",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
}


def read_ds_config(path: str) -> dict[str, Any]:
    """Read ZeRO, precision and offload settings from a DeepSpeed JSON.

    Raises:
        ConfigError: no such file, no JSON, no ZeRO stage 1 to 3, fp16, or a key that the YAML sets.
    """
    if not Path(path).is_file():
        raise ConfigError(f"deepspeed: {path!r} does not exist; ds_configs/ has zero1.json, zero2.json, zero3.json ...")
    try:
        ds_config: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed: {path} is not JSON: {error}") from None
    for key in SET_BY_YAML.keys() & ds_config:
        raise ConfigError(f"{path} sets {key!r}, which {SET_BY_YAML[key]} in the YAML sets; remove it from the JSON")
    if zero_stage(ds_config) not in (1, 2, 3):
        absent = "" if "zero_optimization" in ds_config else " (it has no zero_optimization)"
        raise ConfigError(f"{path}: zero_optimization.stage is {zero_stage(ds_config)}{absent}; it must be 1, 2 or 3")
    if ds_config.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{path} enables fp16, whose range is too small for log-probs; use bf16 or fp32")
    precision = [f"bf16.{key}" for key in ds_config.get("bf16", {}) if key != "enabled"]
    precision += [key for key in ("data_types", "communication_data_type", "torch_autocast") if key in ds_config]
    if precision:
        raise ConfigError(
            f"{path} sets {precision[0]!r}, but precision has one switch, bf16.enabled: it makes weights bf16; masters "
            f"and reduced gradients are always fp32. Remove {precision[0]!r} from the JSON"
        )
    return ds_config


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def compute_dtype(ds_config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that the transformers compute in."""
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


def complete(ds_config: Mapping[str, Any], micro_batch_size: int = 1, max_grad_norm: float = 0.0) -> dict[str, Any]:
    """The JSON with the YAML's settings. `Engine` counts accumulation itself, since updates differ in length.

    `bf16` is removed: the tensors have their final dtypes when DeepSpeed receives them (`precision.py`), and without
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
