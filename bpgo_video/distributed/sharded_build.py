"""Models that are constructed sharded (ZeRO-3): no rank ever holds a whole one.

Rank 0 reads the files and the others receive, so all ranks must end together when a file is damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bpgo_video.distributed.ds_config import complete, finish_build, keep_fp32, model_buffers, read_tensor, tensor_files
from bpgo_video.distributed.mesh import all_or_none, make_mesh
from bpgo_video.weights import WeightsError, check_finite, check_stored


def build_sharded(ds_config: Mapping[str, Any], model_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Construct a diffusers model already sharded (ZeRO-3), and fill it tensor by tensor from its safetensors.

    No rank holds more than its shard and one whole tensor; rank 0 reads the files and broadcasts. Buffers are whole on
    every rank, and exact.

    Raises:
        PrecisionError: a tensor does not have the dtype that `ds_config.py` states.
        WeightsError: on every rank; the files do not hold exactly the model's weights, or one is not finite.
    """
    mesh = make_mesh(torch.device("cpu"))
    with all_or_none(mesh):
        files = check_stored(model_class, folder, tensor_files(folder, model_class))
    # Init's own argument `dtype` is overridden by what the accelerator supports (DeepSpeed 0.19.8); its config is not.
    settings = complete(ds_config) | {"bf16": {"enabled": dtype == torch.bfloat16}}
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = model_class.from_config(model_class.load_config(folder))
    keep_fp32(model, dtype)
    problem: Exception | None = None
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if mesh.is_main and problem is None:
                problem = copy_from(files[name], name, parameter.data)
    with all_or_none(mesh):
        if problem is not None:
            raise problem
    with all_or_none(mesh):
        finish_build(model, model_buffers(model_class, folder, files), dtype)
    return model


def copy_from(file: Path, name: str, whole: Tensor) -> Exception | None:
    """Copy a tensor of a file. Returns its error, since the other ranks would wait for a rank that raises it."""
    try:
        tensor = read_tensor(file, name)
        check_finite(file.parent, [(name, tensor)])
    except WeightsError as error:
        return error
    except (SafetensorError, OSError) as error:
        return WeightsError(f"{file} cannot be read ({error}); download it again")
    whole.copy_(tensor)
    return None
