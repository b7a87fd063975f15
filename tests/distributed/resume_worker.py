"""Worker that trains a small model and saves midway, or resumes from such a checkpoint.

    python -m tests.distributed.ranks resume_worker OUTPUT write|read SAVES

Ranks share each batch of eight, so that worlds of any size compute the same gradients up to rounding.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from bpgo_video.config.bpgo import EmaConfig, OptimConfig, RunConfig
from bpgo_video.distributed import checkpoint, engine, resume
from bpgo_video.distributed.ema import EMA, load_average, save_average
from bpgo_video.distributed.mesh import Mesh
from tests.distributed.ema_worker import Block

UPDATES = 3
STAGES = (1, 2, 3)
KINDS = (("adamw", "float32"), ("sgd", "float32"), ("adamw", "bfloat16"))
Weights = dict[str, Tensor]


def build(stage: int, name: str, dtype: str) -> engine.Engine:
    torch.manual_seed(0)
    return engine.Engine(
        Block().to(getattr(torch, dtype)),
        OptimConfig(name=name, learning_rate=0.05, max_grad_norm=1.0),
        {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": dtype == "bfloat16"},
        },
        micro_batch_size=4,
        learning_rate_factor=lambda update: 1 / (1 + update),
        block_classes=(Block,),
    )


def train(learner: engine.Engine, ema: EMA, mesh: Mesh, first: int) -> None:
    for number in range(first, first + UPDATES):
        batch = torch.randn(8, 7, generator=torch.Generator().manual_seed(number))
        mine = batch.chunk(mesh.world_size)[mesh.rank].to(learner.dtype).requires_grad_()
        learner.backward(learner.wrapped(mine).float().square().mean(), last=True)
        learner.step()
        ema.update()


def weights(learner: engine.Engine) -> Weights:
    named = learner.module.named_parameters()
    return {name: safe_get_full_fp32_param(p).cpu() for name, p in named if p.requires_grad}


def write(saves: Path, stage: int, name: str, dtype: str, mesh: Mesh) -> None:
    """Save midway, and store the final weights of the uninterrupted run next to the checkpoint."""
    learner = build(stage, name, dtype)
    ema = EMA(learner.masters, EmaConfig(decay=0.8))
    run = RunConfig(dir=str(saves / f"{stage}-{name}-{dtype}"))
    train(learner, ema, mesh, 0)
    saver = checkpoint.Saver(learner, run, mesh, lambda saved: None)
    saver.save(UPDATES, {"progress": {"position": 17}}, [partial(save_average, ema)])
    middle = weights(learner)
    train(learner, ema, mesh, UPDATES)  # while the checkpoint is being written
    saver.finish()
    save_average(ema, Path(run.dir), mesh.rank)
    end = weights(learner)
    if mesh.is_main:
        torch.save({"middle": middle, "end": end}, Path(run.dir) / "weights.pt")


def by_hand(middle: Weights, name: str) -> Weights:
    """Train from the midway weights with a fresh optimizer, in plain torch on one rank."""
    module = Block()
    module.load_state_dict(middle, strict=False)
    torch.manual_seed(0)
    module.frozen.load_state_dict(Block().frozen.state_dict())
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer: Any = {"adamw": partial(torch.optim.AdamW, weight_decay=0.0), "sgd": torch.optim.SGD}[name](trained)
    for number in range(UPDATES, 2 * UPDATES):
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + number)
        batch = torch.randn(8, 7, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        module(batch).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def read(saves: Path, written: int, stage: int, name: str, dtype: str, optimizer: str, mesh: Mesh) -> dict[str, Any]:
    """Resume under another stage; return the difference from the uninterrupted run at the end."""
    run_dir = saves / f"{written}-{name}-{dtype}"
    folder = run_dir / "checkpoints" / f"step-{UPDATES:06d}"
    result = {"written": written, "stage": stage, "optimizer": optimizer, "name": name, "dtype": dtype}
    learner = build(stage, name, dtype)
    ema = EMA(learner.masters, EmaConfig(decay=0.8))
    state = resume.load(learner, folder, mesh, optimizer)
    load_average(ema, folder)
    reference = torch.load(run_dir / "weights.pt")
    loaded = weights(learner)
    train(learner, ema, mesh, UPDATES)
    end = weights(learner)
    expected = reference["end"] if optimizer == "keep" else by_hand(reference["middle"], name)
    return {
        **result,
        "position": state["progress"]["position"],
        "loaded": all(torch.equal(loaded[key], value) for key, value in reference["middle"].items()),
        "error": max(float((end[key] - value).norm() / value.norm()) for key, value in expected.items()),
        "left": sorted(path.name for path in folder.parent.iterdir() if path.suffix != ".py"),  # DeepSpeed's
    }


def main(mesh: Mesh, output: str, action: str, folder: str) -> None:
    saves = Path(folder)
    if action == "write":
        for stage, kind in product(STAGES, KINDS):
            write(saves, stage, *kind, mesh)
    cases = product(STAGES, STAGES, KINDS, ("keep", "fresh"))
    results = [read(saves, written, stage, *kind, optimizer, mesh) for written, stage, kind, optimizer in cases]
    if mesh.is_main:
        (Path(output) / "results.json").write_text(json.dumps(results))
