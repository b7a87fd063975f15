"""Precision by contract: the dtype that every parameter and buffer of a transformer has.

A recipe names one dtype for a policy's transformers. Parameters have it, except those of modules that diffusers keeps
in fp32 (`_keep_in_fp32_modules`: Wan's time embedder, norms and modulation tables), as in the pipeline that users
sample with. Buffers are never rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class PrecisionError(RuntimeError):
    """A tensor does not have the dtype that the recipe asks for."""


def parameter_dtype(model_class: type, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a diffusers model's parameter `name` where the model computes in `dtype`."""
    kept = getattr(model_class, "_keep_in_fp32_modules", None) or ()
    return dtype if set(kept).isdisjoint(name.split(".")) else torch.float32


def kept_in_fp32(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """The parameters that stay in fp32 while the model computes in `dtype`."""
    for name, parameter in module.named_parameters():
        if parameter_dtype(type(module), name, dtype) != dtype:
            yield name, parameter


def check_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Check every floating-point parameter, sharded or whole.

    Raises:
        PrecisionError: names the first tensor that differs, its dtype, and the dtype that it must have.
    """
    for name, parameter in module.named_parameters():
        shard = getattr(parameter, "ds_tensor", None)  # of ZeRO-3
        for tensor in (parameter, shard):
            if tensor is not None and tensor.is_floating_point():
                _check(module, "parameter", name, parameter_dtype(type(module), name, dtype), tensor.dtype)


def check_buffers(module: nn.Module, exact: Mapping[str, Tensor]) -> None:
    """Check that no buffer has another dtype than the one that the model's own code gives it. Raises PrecisionError."""
    for name, buffer in module.named_buffers():
        _check(module, "buffer", name, exact[name].dtype, buffer.dtype)


def _check(module: nn.Module, kind: str, name: str, wanted: torch.dtype, found: torch.dtype) -> None:
    if found != wanted:
        raise PrecisionError(
            f"{kind} {name} of {type(module).__name__} is {found} and must be {wanted}. The recipe's precision (`bf16` "
            "in its DeepSpeed JSON) was not followed: please report this with the versions of torch, deepspeed and "
            "diffusers"
        )
