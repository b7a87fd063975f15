"""Distributed fixtures: work on one, two and four ranks, each of which start once per session."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

from tests.conftest import SHARING
from tests.made.random_wan import random_wan
from tests.made.recipes import ROOT, make_shards, python_path

STAGES = ("zero1", "zero2", "zero3")
SMOKE = ("zero2_bf16", "zero3_bf16_offload", "zero3_offload")  # other shipped DeepSpeed configurations
SHARED = [*(f"gradient-{stage}=gradient:{stage}" for stage in STAGES), "credited-4=credited:zero3:4"]
SHARED += [
    "preferred=preferred:zero3",
    "desirable=desirable:zero3",
    *(f"drafted-{steps}=drafted:zero3:{steps}" for steps in (1, 3)),
]
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
        *(f"smoke-{name}=smoke:{name}" for name in SMOKE),
        "gradient-zero3-sequence2=gradient:zero3:2",  # other stages: test_sequence.py
        *(f"ratio-zero3-{lora}-sequence2=exact_ratio:zero3:{lora}:2" for lora in ("full", "lora")),
        *(f"ratio-zero3-{lora}-gathered=exact_ratio:zero3:{lora}:1:gathered" for lora in ("full", "lora")),
        *(
            f"held-{stage}-{lora}-{weight}=held:{stage}:{lora}:{weight}"
            for stage, lora in (("zero2", "full"), ("zero3", "full"), ("zero3", "lora"))
            for weight in ("0", "1000")
        ),
        "credited-2=credited:zero3:2",
        *(f"slow-{lora}=slow_policy:zero3:{lora}:3" for lora in ("full", "lora")),
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
    command = [sys.executable, "-m", "tests.distributed.ranks", worker, *arguments]
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
    assert not any(rank.returncode for rank in ranks), "\n".join(output[-6000:] for output in outputs)


Work = Callable[[int, Path, Path], list[str]]  # (number of ranks, prompt shards, empty folder) -> worker and arguments


def memory_work(world_size: int, shards: Path, folder: Path) -> list[str]:
    return ["worker", str(shards), str(folder), f"memory=sharded_memory:{large_transformer(folder / 'large')}"]


def precision_work(world_size: int, shards: Path, folder: Path) -> list[str]:
    random_wan(folder / "wan")
    return ["precision_worker", str(folder), str(folder / "wan")]


SHARED_WORK: dict[str, tuple[tuple[int, ...], Work]] = {  # fixture -> numbers of ranks, work
    "memory": ((2,), memory_work),  # first, while the heap has no holes
    "agreement": ((2,), lambda ranks, shards, folder: ["agreement_worker", str(folder)]),
    "averages": ((1, 2), lambda ranks, shards, folder: ["ema_worker", str(folder)]),
    "sequences": ((2,), lambda ranks, shards, folder: ["sequence_worker", str(folder)]),
    "worlds": ((1, 2, 4), lambda ranks, shards, folder: ["worker", str(shards), str(folder), *WORLD_CASES[ranks]]),
    "precision": ((2,), precision_work),  # last, since it changes what the accelerator reports
}


@pytest.fixture(scope="session")
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shards: Path
) -> dict[str, dict[int, Path]]:
    """Folders with the results of the SHARED_WORK that this session's tests need, by fixture and number of ranks.

    One launch of each number of ranks does all of it, since starting takes longer than most of the work.
    """
    items = [item for item in request.session.items if "shared" in getattr(item, "fixturenames", ())]
    assert {item.path.stem for item in items} <= SHARING, "make test must give them to one process: add the file"
    needed = {name for item in items for name in item.fixturenames}
    found: dict[str, dict[int, Path]] = {name: {} for name in SHARED_WORK if name in needed}
    for ranks in (1, 2, 4):
        words: list[str] = []
        for name in found:
            sizes, work = SHARED_WORK[name]
            if ranks in sizes:
                found[name][ranks] = tmp_path_factory.mktemp(f"{name}{ranks}")
                words += [*work(ranks, shards, found[name][ranks]), "--"]
        if words:
            run_ranks(ranks, words[1:], worker=words[0], timeout=1000)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the first test of a session the time for its shared work."""
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture(scope="session")
def worlds(shared: dict[str, dict[int, Path]]) -> dict[int, Path]:
    """Folder of the runs of WORLD_CASES for each number of ranks."""
    return shared["worlds"]


@pytest.fixture(scope="session")
def memory(shared: dict[str, dict[int, Path]]) -> Path:
    """Folder with the memory that each of two ranks used while building a large model under ZeRO-3."""
    return shared["memory"][2]


def large_transformer(folder: Path) -> Path:
    """A Wan transformer of 200 MB, much larger than everything else in a rank's memory."""
    size = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 10, "text_dim": 64}
    WanTransformer3DModel(**size, in_channels=8, out_channels=8, freq_dim=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("prompts") / "shards")
