"""The DeepSpeed JSON, read and checked without torch: before a launcher starts, and again on every rank.

Its structure, ZeRO's stage, precision and offload are checked here. DeepSpeed checks its further settings on the ranks
(`distributed.engine.require_supported`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.documents import plain_json, read_text, wrong_value

SET_BY_YAML = {
    "train_batch_size": "rollout, or sft.batch_size,",
    "train_micro_batch_size_per_gpu": "rollout.micro_batch_size, or sft.micro_batch_size,",
    "gradient_accumulation_steps": "optim.updates_per_rollout, or sft.batch_size,",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Switch(_Part):
    enabled: bool = False


class _Offload(_Part):
    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    pin_memory: bool = False


class _Zero(_Part):
    stage: int = 0
    offload_optimizer: _Offload | None = None
    offload_param: _Offload | None = None


class _DeepSpeed(_Part):
    zero_optimization: _Zero = _Zero()
    bf16: _Switch = _Switch()
    fp16: _Switch = _Switch()


def read_ds_config(path: str) -> dict[str, Any]:
    """Read ZeRO, precision and offload settings from a DeepSpeed JSON.

    Raises:
        ConfigError, MalformedFile: no such file, no JSON, a value of another type, no ZeRO stage 1 to 3, fp16, or a key
            that the YAML sets.
    """
    if not Path(path).is_file():
        raise ConfigError(f"deepspeed: {path!r} does not exist; ds_configs/ has zero1.json, zero2.json, zero3.json ...")
    ds_config: dict[str, Any] = plain_json(read_text(Path(path)), path)
    _check_types(ds_config, path)
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


def _check_types(ds_config: Any, path: str) -> None:
    try:
        _DeepSpeed.model_validate(ds_config)
    except ValidationError as error:
        raise ConfigError(f"{path}: {wrong_value(error)}; ds_configs/ has examples") from None


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))
