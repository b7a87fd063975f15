"""Worker for supervised fine-tuning: each case is a short run in the same process group.

python -m tests.distributed.ranks sft_worker SHARDS OUTPUT NAME=STAGE:KIND:STEPS[:RESUME[:SEQUENCE]] ...
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bpgo_video.config.policy import LoraConfig
from bpgo_video.config.run import EmaConfig, ParallelConfig
from bpgo_video.config.sft import SftConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.training.sft import train
from tests.made.clip_folders import sft_recipe

HUGE_STEP = 1e5  # of SGD: the weights' change is the gradient, to many digits
OPTIM: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-3},
    "lora": {"learning_rate": 1e-3},
    "gradient": {"name": "sgd", "learning_rate": HUGE_STEP, "max_grad_norm": 0.0, "weight_decay": 0.0},
}


def case(
    shards: Path, run_dir: Path, stage: str, kind: str, steps: str, resume: str = "never", sequence: str = "1"
) -> SftConfig:
    """A run with 8 of 20 clips per step, so that a step crosses an epoch; a checkpoint every two steps."""
    config = sft_recipe()
    policy = replace(config.policy, lora=LoraConfig(rank={"lora": 4}.get(kind, 0)))
    return replace(
        config,
        run=replace(config.run, dir=str(run_dir), num_steps=int(steps), save_every=2, resume=resume),
        policy=policy,
        data=replace(config.data, shards=str(shards)),
        deepspeed=f"ds_configs/{stage}.json",
        parallel=ParallelConfig(sequence=int(sequence)),
        sft=replace(config.sft, batch_size=8, micro_batch_size=4, density="logit_normal", caption_dropout=0.3),
        optim=replace(config.optim, **{"warmup_updates": 0, **OPTIM[kind]}),
        ema=EmaConfig(decay=0.9),
        evaluation=replace(config.evaluation, levels=2, every=2, split=None if kind == "gradient" else "heldout"),
    )


def main(mesh: Mesh, shards: str, output: str, *cases: str) -> None:
    for named in cases:
        name, _, arguments = named.partition("=")
        train(case(Path(shards), Path(output) / name, *arguments.split(":")))
