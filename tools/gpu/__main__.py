"""Checks and timings of training on one GPU in a few minutes, without network or published weights: `make gpu`.

    python -m tools.gpu --output runs/gpu
    python -m tools.gpu --output runs/gpu --stages checks attention --minutes 4
    python -m tools.gpu --output runs/gpu-dry --dry-run

Stages run in order of importance while the time budget lasts. OUTPUT/gpu.json and gpu.md are rewritten after every
result, so an interrupted run keeps its results. The exit code is 1 if a stage raises or a check does not hold; stages
skipped for lack of time are recorded and are not failures.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from diffusers.models.attention_dispatch import attention_backend

from bpgo_video.cli import show_loading_once
from bpgo_video.distributed.process_group import stop_ranks
from bpgo_video.inference.hub import this_code
from tools.gpu.bench import Bench, published, start, tiny
from tools.gpu.checks import checks
from tools.gpu.speed import (
    TIMED_BACKENDS,
    attention,
    compiled,
    large_model,
    matrix_rate,
    memory_plan,
    small_model,
)
from tools.gpu.stages import MINUTES, Note, Record, Stage, run_stages

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "triton", "flash-attn", "flash-attn-3")


def device(bench: Bench, note: Note) -> None:
    """The GPU's properties and its rate of matrix products."""
    note("platform", f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores")
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        note("name", properties.name)
        note("memory_bytes", properties.total_memory)
        note("capability", list(torch.cuda.get_device_capability(bench.device)))
        note("cuda", torch.version.cuda)
        note("cudnn", torch.backends.cudnn.version())
        note("nccl", list(torch.cuda.nccl.version()))
    note("attention_backends", [name for name in TIMED_BACKENDS if is_installed(name)])
    note("bf16_matrix_rate", matrix_rate(bench))
    if bench.device.type == "cuda":
        note("driver", driver())


def is_installed(backend: str) -> bool:
    """Whether diffusers finds the package of an attention backend; the checks show whether it runs here."""
    try:
        with attention_backend(backend):
            return True
    except (ImportError, RuntimeError):
        return False


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()


STAGES: dict[str, Stage[Bench]] = {  # in order of importance, with approximate seconds on an H200
    "device": Stage(device, 10),
    "checks": Stage(checks, 80),
    "small_model": Stage(small_model, 130),
    "attention": Stage(attention, 110),
    "large_model": Stage(large_model, 60),
    "memory_plan": Stage(memory_plan, 40),
    "compiled": Stage(compiled, 80),
}


def facts(arguments: Sequence[str]) -> dict[str, Any]:
    versions = {package.name: package.version for package in distributions() if package.name in PACKAGES}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "tools.gpu", *arguments]),
        "code": this_code(),
        "packages": versions,
    }


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m tools.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--output", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and gpu.md (runs/gpu)"
    )
    arguments.add_argument(
        "--minutes", type=float, default=MINUTES, help="time budget from the start of the process (9)"
    )
    arguments.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run (all)")
    arguments.add_argument("--dry-run", action="store_true", help="small shapes, for machines without a GPU")
    return arguments


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parser().parse_args(arguments)
    if not chosen.dry_run and not torch.cuda.is_available():
        parser().error("torch finds no GPU; --dry-run runs the same stages on a CPU, with small shapes")
    show_loading_once()
    gc.freeze()  # collections then scan only objects of the stages, not the imports
    record = Record(chosen.output, psutil.Process().create_time(), facts(arguments))
    with TemporaryDirectory() as scratch:
        bench = start(Path(scratch), tiny() if chosen.dry_run else published())
        all_hold = run_stages(
            {name: STAGES[name] for name in STAGES if name in chosen.stages}, bench, record, chosen.minutes
        )
        stop_ranks()
    print((chosen.output / "gpu.md").read_text("utf-8"))
    return 0 if all_hold else 1


if __name__ == "__main__":
    raise SystemExit(main())
