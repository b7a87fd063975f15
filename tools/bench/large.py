"""Training, saving, conversion and verification of a large random policy on two ranks: time and memory.

    python -m tools.bench.large --shape half_billion --output runs/large
    python -m tools.bench.large --shape wan_1_3b --output runs/large

half_billion trains all weights with AdamW in fp32, wan_1_3b (Wan2.1-1.3B's transformer but for the latent channels and
the text width of the embedded policy) adapters in bf16. Videos are tiny. Every phase runs in a separate process; its
seconds and peak resident memory, in total and of the largest process, are written to OUTPUT/SHAPE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from diffusers import WanTransformer3DModel

from bpgo_video.files import resolve_folder, write_json
from bpgo_video.inference.conversion import FORMATS
from tools.bench.__main__ import machine

SMALL = "package:bpgo_video.tiny/weights/wan"
RECIPE = Path("pipelines/configs/tiny_wan_bpgo.yaml").absolute()
TEXT_TOKENS = 16
INTERVAL = 0.1  # seconds between memory samples
BUCKETS = {  # DeepSpeed's defaults, 5e8 values, are 2 GB per rank in fp32
    "reduce_bucket_size": 5e7, "stage3_prefetch_bucket_size": 5e7, "stage3_max_live_parameters": 1e8,
    "sub_group_size": 1e8,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The size of a policy, its training, and the formats of its export."""

    transformer: dict[str, int]
    dtype: torch.dtype
    lora_rank: int
    formats: Sequence[str]


CASES = {
    "half_billion": Case(
        {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": 30},
        torch.float32, 0, ("diffusers", "universal"),
    ),
    "wan_1_3b": Case(
        {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
        torch.bfloat16, 32, ("diffusers", "lora", "comfyui"),
    ),
}  # fmt: skip


def write_policy(case: Case, folder: Path) -> int:
    """Write the embedded pipeline with a random transformer of the case's size; return its number of parameters."""
    small = resolve_folder(SMALL)
    shutil.copytree(small, folder, ignore=lambda path, _: {"transformer"} if Path(path) == small else set())
    config = json.loads((small / "transformer" / "config.json").read_text("utf-8"))
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_config({**config, **case.transformer, "freq_dim": 256}).to(case.dtype)
    transformer.save_pretrained(folder / "transformer", max_shard_size="1GB")
    return sum(parameter.numel() for parameter in transformer.parameters())


def write_recipe(case: Case, folder: Path) -> Path:
    """Write a recipe of one step: two prompts with two samples each, and one trained denoising step."""
    recipe = {
        "base": str(RECIPE),
        "run": {"dir": str(folder / "run"), "num_steps": 1, "save_every": 1},
        "policy": {
            "folder": str(folder / "policy"),
            "max_sequence_length": TEXT_TOKENS,
            "gradient_checkpointing": True,
            "lora": {"rank": case.lora_rank},
        },
        "video": {"num_frames": 5, "height": 64, "width": 64},
        "data": {"shards": str(folder / "shards")},
        "deepspeed": str(folder / "deepspeed.json"),
        "prior": {"kind": "constant", "mean": 0.1, "scale": 0.1},
        "sampler": {"num_steps": 3, "train_steps": "random", "train_fraction": 0.5, "share_steps": "group"},
        "rollout": {"prompts_per_step": 2, "group_size": 2, "micro_batch_size": 2, "parameters": "sharded"},
        "optim": {"updates_per_rollout": 1},
        "evaluation": {"every": 0, "rewards": {}},
    }
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **BUCKETS}
    bf16 = {"enabled": case.dtype == torch.bfloat16}
    write_json(folder / "deepspeed.json", {"bf16": bf16, "zero_optimization": zero})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    return path


def run_and_measure(command: Sequence[str]) -> dict[str, float]:
    """Run a command; return its seconds and peak resident gigabytes, of all its processes and of the largest one.

    Raises:
        subprocess.CalledProcessError: if its exit code is not 0.
    """
    started = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    together = largest = 0
    while process.poll() is None:
        sizes = resident(psutil.Process(process.pid))
        together, largest = max(together, sum(sizes)), max(largest, *sizes)
        time.sleep(INTERVAL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "together_gb": together / 1e9, "largest_gb": largest / 1e9}


def resident(process: psutil.Process) -> list[int]:
    """Resident bytes of a process and of each descendant; 0 for processes that have ended."""
    sizes = [0]
    try:
        for member in [process, *process.children(recursive=True)]:
            sizes.append(member.memory_info().rss)
    except psutil.NoSuchProcess:
        pass  # ended between two samples
    return sizes


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Measure all phases of a case, each in separate processes."""
    case, python = CASES[name], sys.executable
    parameters = write_policy(case, folder / "policy")
    launcher = Path(python).with_name("deepspeed")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle moving left\na blue square moving up\n", "utf-8")
    subprocess.run(
        [python, "tools/make_prompt_shards.py", "build", "--input", prompts, "--output", folder / "shards",
         "--policy", folder / "policy", "--max-sequence-length", str(TEXT_TOKENS)], check=True,
    )  # fmt: skip
    recipe = write_recipe(case, folder)
    results = {
        "train, save, export": run_and_measure(
            [launcher, "--num_accelerators", "2", "pipelines/train_video.py", "--config", recipe]
        )
    }
    dtype = str(case.dtype).removeprefix("torch.")
    for form in case.formats:
        convert = [
            python,
            "tools/convert_checkpoint.py",
            "--checkpoint",
            folder / "run",
            "--format",
            form,
            "--dtype",
            dtype,
        ]
        small_shards = ["--shard-gigabytes", "0.5"] if "shard_bytes" in FORMATS[form].options else []
        results[f"convert to {form}"] = run_and_measure([*convert, "--output", folder / form, *small_shards])
        shutil.rmtree(folder / form)
        results[f"convert to {form} and verify"] = run_and_measure(
            [*convert, "--output", folder / form, *small_shards, "--verify"]
        )
        shutil.rmtree(folder / form)
    return {"shape": name, "parameters": parameters, "machine": machine(), "phases": results}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.large", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=tuple(CASES), required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/large"))
    args = parser.parse_args()
    folder = args.output / args.shape
    folder.mkdir(parents=True)
    try:
        results = measure(args.shape, folder)
    finally:
        shutil.rmtree(folder)
    write_json(args.output / f"{args.shape}.json", results)
    print(f"{results['parameters'] / 1e9:.2f}B parameters")
    for phase, figures in results["phases"].items():
        print(f"{phase}: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
