"""Worker that trains with one gradient of nan among finite ones, on one rank alone, under each ZeRO stage.

python -m tests.distributed.ranks skip_worker OUTPUT
"""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from bpgo_video.config.bpgo import EmaConfig, OptimConfig
from bpgo_video.distributed import engine
from bpgo_video.distributed.ema import EMA
from bpgo_video.distributed.mesh import Mesh
from tests.distributed.ema_worker import Block

CASES = list(product((1, 2, 3), ("float32", "bfloat16"), (False, True)))  # stage, dtype, offloaded optimizer
FINITE, POISONED = [0, 1, 2, 3], [0, 1, None, 2, None, 3]  # numbers of batches; None is a batch of nan on the last rank


def build(stage: int, dtype: str, offload: bool, max_skipped: int = 1) -> engine.Engine:
    torch.manual_seed(0)
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return engine.Engine(
        Block().to(getattr(torch, dtype)),
        OptimConfig(learning_rate=0.05, max_skipped=max_skipped),
        {"zero_optimization": zero, "bf16": {"enabled": dtype == "bfloat16"}},
        micro_batch_size=4,
        learning_rate_factor=lambda update: 1 / (1 + update),
        block_classes=(Block,),
    )


def update(learner: engine.Engine, batch: int | None, mesh: Mesh) -> float:
    inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(1000 * (batch or 0) + mesh.rank))
    if batch is None and mesh.rank == mesh.world_size - 1:
        inputs[0, 0] = math.nan
    for last in (False, True):  # two passes an update
        loss = learner.wrapped(inputs.to(learner.dtype).requires_grad_()).float().square().mean()
        learner.backward(loss / 2, last=last)
    return learner.step()


def state(learner: engine.Engine, ema: EMA) -> list[Tensor]:
    named = [safe_get_full_fp32_param(p).cpu() for p in learner.module.parameters() if p.requires_grad]
    return [*named, *(shard.values.cpu() for shard in ema.shards), torch.tensor(learner.learning_rate)]


def train(case: tuple[int, str, bool], batches: list[int | None], mesh: Mesh) -> tuple[list[float], list[Tensor]]:
    learner = build(*case)
    ema = EMA(learner.masters, EmaConfig(decay=0.8))
    learner.after_update = ema.update
    norms = [update(learner, batch, mesh) for batch in batches]
    return norms, state(learner, ema)


def ended(mesh: Mesh) -> dict[str, Any]:
    """Three poisoned batches in a row, where one may be skipped."""
    learner = build(3, "float32", False)
    ema = EMA(learner.masters, EmaConfig(decay=0.8))
    before, norms = state(learner, ema), []
    try:
        while len(norms) < 3:
            norms.append(update(learner, None, mesh))
    except FloatingPointError as error:
        after = state(learner, ema)
        unchanged = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        return {"error": str(error), "skipped": len(norms), "unchanged": unchanged}
    return {"error": ""}


def main(mesh: Mesh, output: str) -> None:
    found = []
    for case in CASES:
        norms, weights = train(case, list(FINITE), mesh)
        poisoned, others = train(case, POISONED, mesh)
        equal = all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))
        found.append({"case": case, "norms": norms, "poisoned": list(map(str, poisoned)), "equal": equal})
    results = [json.dumps({"cases": found, "ended": ended(mesh)})] * mesh.world_size
    Path(output, f"rank-{mesh.rank}.json").write_text(results[0])
