"""Distributed fixtures: worlds of one and two ranks, each started once per session."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

from tests.made.recipes import ROOT, make_shards, python_path

STAGES = ("zero1", "zero2", "zero3")
SHARED = [*(f"gradient-{stage}=gradient:{stage}" for stage in STAGES), "credited-4=credited:zero3:4"]
WORLD_CASES = {
    1: SHARED,
    2: [
        *SHARED,
        *(f"ratio-{stage}-{lora}=exact_ratio:{stage}:{lora}" for stage in STAGES for lora in ("full", "lora")),
        "whole=steps:4",
        "stopped=steps:2",
        "stopped=steps:4:auto",
        "ema-whole=ema:4",
        "ema-stopped=ema:3",
        "ema-stopped=ema:4:auto",
        "smoke-offload=smoke:zero3_offload",
        "smoke-bf16=smoke:zero3_bf16",
        *(f"gradient-{stage}-sequence2=gradient:{stage}:2" for stage in STAGES),
        *(f"ratio-zero3-{lora}-sequence2=exact_ratio:zero3:{lora}:2" for lora in ("full", "lora")),
        *(f"ratio-zero3-{lora}-gathered=exact_ratio:zero3:{lora}:1:gathered" for lora in ("full", "lora")),
        *(
            f"held-{stage}-{lora}-{weight}=held:{stage}:{lora}:{weight}"
            for stage, lora in (("zero2", "full"), ("zero3", "full"), ("zero3", "lora"))
            for weight in ("0", "1000")
        ),
        "credited-2=credited:zero3:2",
        *(
            f"held-{stage}-{lora}-{reference}=held:{stage}:{lora}:1000:{reference}"
            for stage, lora, reference in (
                ("zero2", "full", "ema"),
                ("zero3", "full", "ema"),
                ("zero3", "lora", "ema"),
                ("zero3", "full", "previous"),
            )
        ),
        *(f"evaluated-{every}=evaluated:{every}" for every in ("never", "1")),
        *(f"ahead-{chunks}=ahead:{chunks}" for chunks in (0, 2)),
        *(f"uneven-{parameters}=uneven:{parameters}" for parameters in ("sharded", "gathered")),
    ],
    4: [
        "gradient-zero3-sequence2=gradient:zero3:2",
        "ratio-zero3-full-sequence4=exact_ratio:zero3:full:4:gathered",
    ],
}


def free_port() -> int:
    """A free port for one launch; the launcher's default port is shared by the whole machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    world_size: int, arguments: list[str], timeout: float = 600, worker: str = "worker", **environment: str
) -> None:
    """Run the worker on `world_size` local ranks; print their output if one fails."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()), "PYTHONPATH": python_path(), **environment}  # fmt: skip
    command = [sys.executable, "-m", f"tests.distributed.{worker}", *arguments]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-6000:]


def large_transformer(folder: Path) -> Path:
    """A Wan transformer of 200 MB, much larger than everything else in a rank's memory."""
    size = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 10, "text_dim": 64}
    WanTransformer3DModel(**size, in_channels=8, out_channels=8, freq_dim=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("prompts") / "shards")


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[int, Path]:
    """Folder of results for each world size."""
    folders = {}
    for world_size, cases in WORLD_CASES.items():
        folders[world_size] = tmp_path_factory.mktemp(f"world{world_size}")
        run_ranks(world_size, [str(shards), str(folders[world_size]), *cases])
    return folders


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the memory that each of two ranks used while building a large model under ZeRO-3.

    Separate processes with an allocator that returns freed memory at once, so that the resident size equals the
    allocated memory.
    """
    folder = tmp_path_factory.mktemp("memory")
    case = f"memory=sharded_memory:{large_transformer(tmp_path_factory.mktemp('large'))}"
    run_ranks(2, ["unused", str(folder), case], MALLOC_MMAP_THRESHOLD_="65536")
    return folder
