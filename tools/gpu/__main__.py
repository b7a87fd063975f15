"""Check and time training on one GPU in a few minutes, without network or published weights: `make gpu`.

    python -m tools.gpu --output runs/gpu
    python -m tools.gpu --output runs/gpu --stages checks attention --minutes 4
    python -m tools.gpu --output runs/gpu-dry --dry-run

Stages run in order of value while the budget lasts. OUTPUT/gpu.json and gpu.md are rewritten with every figure, so that
a run that is cut keeps what it measured. Exit code 1 where a stage raised or a check does not hold; what is skipped for
time is recorded, and no failure.
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
from bpgo_video.code_version import this_code
from bpgo_video.distributed.engine import stop_ranks
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
    """Which GPU this is, and how fast it multiplies matrices."""
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
    """Whether diffusers finds the package of an attention backend; whether it runs here is for the checks to say."""
    try:
        with attention_backend(backend):
            return True
    except (ImportError, RuntimeError):
        return False


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()


STAGES: dict[str, Stage[Bench]] = {  # in order of value, with the seconds that each takes about on an H200
    "device": Stage(device, 10),
    "checks": Stage(checks, 80),
    "small_model": Stage(small_model, 130),
    "attention": Stage(attention, 110),
    "large_model": Stage(large_model, 60),
    "memory_plan": Stage(memory_plan, 40),
    "compiled": Stage(compiled, 80),
}


def facts(arguments: Sequence[str]) -> dict[str, Any]:
    versions = {found.name: found.version for found in distributions() if found.name in PACKAGES}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "tools.gpu", *arguments]),
        "code": this_code(),
        "packages": versions,
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m tools.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and gpu.md (runs/gpu)")
    found.add_argument("--minutes", type=float, default=MINUTES, help="since the start of the process (9)")
    found.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which of them (all)")
    found.add_argument("--dry-run", action="store_true", help="small shapes, where there is no GPU")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = parser().parse_args(arguments)
    if not chosen.dry_run and not torch.cuda.is_available():
        parser().error("torch sees no GPU; --dry-run runs the same stages on a CPU, with small shapes")
    show_loading_once()
    gc.freeze()  # what was imported stays: each collection looks at the stages' objects alone
    record = Record(chosen.output, psutil.Process().create_time(), facts(arguments))
    with TemporaryDirectory() as scratch:
        bench = start(Path(scratch), tiny() if chosen.dry_run else published())
        well = run_stages(
            {name: STAGES[name] for name in STAGES if name in chosen.stages}, bench, record, chosen.minutes
        )
        stop_ranks()
    print((chosen.output / "gpu.md").read_text("utf-8"))
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
