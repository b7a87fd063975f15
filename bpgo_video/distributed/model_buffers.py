"""What does a model compute with that no optimiser trains? Its buffers, such as tables of positions, in full precision.

DeepSpeed's construction of a sharded model rounds every number to the model's dtype on the way, also those that
positions are computed from: in bf16, cosines of rotary embeddings end up a tenth off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from bpgo_video.distributed.precision import check_buffers, check_parameters
from bpgo_video.distributed.stored_tensors import stored


def model_buffers(model_class: Any, folder: Path, files: Mapping[str, Path]) -> dict[str, Tensor]:
    """A diffusers model's buffers by name, on the CPU: from the files that store them, else as its code computes them.

    Args:
        files: which safetensors file holds each tensor of `folder`.
    """
    with init_empty_weights(include_buffers=False):  # parameters take no memory
        model = model_class.from_config(model_class.load_config(folder))
    return {name: stored(files[name], name) if name in files else buffer for name, buffer in model.named_buffers()}


def put_in_place(module: torch.nn.Module, exact: Mapping[str, Tensor]) -> None:
    """Give a module these buffers, each on the device where it was."""
    for name, buffer in module.named_buffers():
        buffer.data = exact[name].to(buffer.device)


def finish_build(model: nn.Module, buffers: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Put exact buffers in place and check the dtype of every tensor: the end of each way to build a transformer."""
    put_in_place(model, buffers)
    check_parameters(model, dtype)
    check_buffers(model, buffers)
