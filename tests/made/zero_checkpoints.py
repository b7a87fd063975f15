"""Synthetic checkpoints in the layouts of ZeRO 1, 2 and 3, for tests that need no training."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from bpgo_video.distributed.manifest import Layout, Manifest, file_of, read_manifest, write_manifest

CODE = "bpgo_video 0.0.1, commit 0123456"
Tensors = Mapping[str, Tensor]


def write_average(folder: Path, average: Tensors) -> None:
    """Write an average of the weights next to them, as a run with `ema.decay` on one rank does."""
    shards = {name: {"start": 0, "shape": tensor.shape} for name, tensor in average.items()}
    save_file(
        {name: tensor.flatten() for name, tensor in average.items()},
        folder / "ema-rank-00000.safetensors",
        metadata={"updates": "2", "shards": json.dumps(shards)},
    )
    seal(folder)


def seal(folder: Path, layout: Layout | None = None) -> None:
    """Write or renew a checkpoint's manifest; the layout stays what it was."""
    layout = layout or read_manifest(folder).layout
    files = {path.name: file_of(path) for path in sorted(folder.iterdir()) if path.suffix in {".pt", ".safetensors"}}
    write_manifest(Manifest(2, layout, files), folder)


def joined(tensors: Tensors, world_size: int) -> list[Tensor]:
    """ZeRO 1 and 2: the padded vector of all parameters in one slice per rank; the last slice is without padding."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    pieces = pad(flat, (0, -len(flat) % (2 * world_size))).chunk(world_size)
    return [piece[: max(0, len(flat) - rank * len(piece))] for rank, piece in enumerate(pieces)]


def cut(tensors: Tensors, world_size: int) -> list[Tensor]:
    """ZeRO 3: every parameter, padded and split into one shard per rank."""
    padded = [pad(tensor.flatten(), (0, -tensor.numel() % world_size)) for tensor in tensors.values()]
    return [torch.cat([flat.chunk(world_size)[rank] for flat in padded]) for rank in range(world_size)]


FLAT: dict[int, tuple[str, Callable[[Tensors, int], list[Tensor]]]] = {
    1: ("single_partition_of_fp32_groups", joined),
    2: ("single_partition_of_fp32_groups", joined),
    3: ("fp32_flat_groups", cut),
}


def write_checkpoint(
    folder: Path, groups: list[Tensors], stage: int = 2, world_size: int = 2, moments: list[Tensors] | None = None
) -> Path:
    """Write a checkpoint of parameter groups with the run's progress; return `folder`.

    Args:
        moments: exp_avg and exp_avg_sq of AdamW for a single group; ZeRO 3 only.
    """
    key, split = FLAT[stage]
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in groups]
    pieces = [split(group, world_size) for group in groups]
    folder.mkdir(parents=True, exist_ok=True)
    model: dict[str, Any] = {
        "param_shapes": shapes, "module": {}, "buffer_names": [], "shared_params": {}, "ds_version": "0",
        "progress": {"step": 2}, "code": [CODE],
    }  # fmt: skip
    for rank in range(world_size):
        adam = {
            name: split(tensors, world_size)[rank].clone()
            for name, tensors in zip(("exp_avg", "exp_avg_sq"), moments or (), strict=False)
        }
        state = {
            "zero_stage": ZeroStageEnum(stage), "partition_count": world_size if stage == 3 else [world_size],
            key: [parts[rank].clone() for parts in pieces],
            "optimizer_state_dict": {"state": {0: adam}, "param_groups": [{"lr": 0.1}]},
        }  # fmt: skip
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": state}, folder / f"{name}_optim_states.pt")
        if stage == 3:
            torch.save(model, folder / f"{name}_model_states.pt")
    if stage < 3:
        torch.save(model, folder / "mp_rank_00_model_states.pt")
    seal(folder, Layout(world_size, stage, "torch.float32"))
    return folder
