"""The ranks of a launch: joining and leaving their process group."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import deepspeed
import torch

from bpgo_video.cli import free_port
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed.mesh import TIMEOUT, Mesh
from bpgo_video.errors import install_excepthook


def start_ranks(timeout: timedelta = TIMEOUT) -> Mesh:
    """Join the launcher's process group; without a launcher, start a group of one.

    Raises:
        ConfigError: the launcher's port is in use, or see `refuse_lone_tasks`.
    """
    install_excepthook()
    if "RANK" not in os.environ:
        refuse_lone_tasks()
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Weights come and go between rollouts and updates; growing segments leave fewer gaps that no tensor fits.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:  # otherwise, init_distributed compiles a shared-memory operator that nothing here needs
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed's launcher sets it. Without it, ZeRO-3 starts a program for each reduction to count "devices".
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} is in use by another process of {socket.gethostname()}, and rank 0 must "
            "listen on it; pass a free one to the launcher (deepspeed --master_port N), or start ranks with "
            "bpgo-video ... --ranks N, which finds one"
        ) from error
    return Mesh(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), device=device)


def refuse_lone_tasks() -> None:
    """Refuse to train alone in a process that srun or mpirun started next to others without DeepSpeed's launcher.

    Raises:
        ConfigError: names the environment variable that shows it, and the way out.
    """
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name, "1")) > 1:
            raise ConfigError(
                f"{name} is {os.environ[name]}, but RANK is not set: each of these processes would train alone; "
                "start `deepspeed --no_ssh --node_rank N ...` once on every node, as docs/multi_node.md shows"
            )


def stop_ranks() -> None:
    """Leave the process group together; call it once the run has ended well on every rank.

    The barrier lets rank 0 print first: a launcher ends it when another rank exits with the code of a verdict.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
