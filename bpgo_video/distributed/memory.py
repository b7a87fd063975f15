"""Free memory of a rank, and whether a whole copy of the sharded weights fits on all of them during a rollout."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from bpgo_video.distributed.container import available_memory
from bpgo_video.distributed.mesh import Mesh

SHARE_FOR_WEIGHTS = 0.5  # of the free memory; activations, attention and VAE decoding need the rest


def free_bytes(device: torch.device) -> int:
    """What a rank may still allocate: on a GPU with what torch's allocator has in reserve, on a CPU its part of the
    machine's, or of the container's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_memory() // ranks_of_this_host()


def ranks_of_this_host() -> int:
    """As DeepSpeed's launcher or torchrun says; 1 where neither started this process."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")


def fits_everywhere(missing_bytes: int, mesh: Mesh) -> bool:
    """Whether every rank can take `missing_bytes` more, which is the same answer on all of them."""
    room = torch.tensor(SHARE_FOR_WEIGHTS * free_bytes(mesh.device) - missing_bytes, dtype=torch.float64)
    room = room.to(mesh.device)
    if mesh.world_size > 1:
        dist.all_reduce(room, op=dist.ReduceOp.MIN)
    return bool(room >= 0)
