"""Benchmarks of sharding cost, rollouts against diffusers, and the scaling of a step: `make bench`.

    python -m tools.bench --recipe pipelines/configs/tiny_wan_full.yaml --output runs/bench

Runs a world of two ranks and one of a single rank, with one thread per rank. Prints the table and writes
OUTPUT/bench.json and OUTPUT/bench.md. Only ratios within one run are comparable.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bpgo_video.files import atomic_file, write_json
from tools.bench.table import as_markdown


def measure(world_size: int, recipe: Path, output: Path) -> dict[str, Any]:
    """Results of a world of that many ranks."""
    result = output / f"world{world_size}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}",
               "-m", "tools.bench.worker", str(recipe), str(result)]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(result.read_text("utf-8"))


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {"date": datetime.now(UTC).date().isoformat(), "processor": name, "cores": os.cpu_count()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("pipelines/configs/tiny_wan_full.yaml"))
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    single, pair = (measure(world_size, args.recipe, args.output) for world_size in (1, 2))
    results = {**single, **pair, "scaling": single["scaling"] + pair["scaling"], "machine": machine()}
    write_json(args.output / "bench.json", results)
    table = as_markdown(results)
    with atomic_file(args.output / "bench.md") as path:
        path.write_text(table, "utf-8")
    print(table)


if __name__ == "__main__":
    main()
