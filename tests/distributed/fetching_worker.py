"""Worker that trains a transformer under ZeRO-3 with several limits on what is fetched ahead and kept, and after
forwards with whole weights, whose number differs between the ranks.

python -m tests.distributed.ranks fetching_worker OUTPUT
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from torch import Tensor

from bpgo_video.config.bpgo import OptimConfig, VideoConfig
from bpgo_video.distributed import ds_config, engine
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.planning.footprint import transformer_inputs
from tests.distributed.memory_worker import MODEL, POLICY

UPDATES, PASSES = 2, 2
TRANSFORMER = {**MODEL.transformer, "num_layers": 5, "ffn_dim": 256}
VIDEO = VideoConfig(num_frames=5, height=64, width=64, fps=16.0)
NOTHING_AHEAD = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


def inputs(mesh: Mesh, number: int) -> dict[str, Any]:
    """Random ones, different on each rank and in each pass."""
    generator = torch.Generator().manual_seed(100 * mesh.rank + number)
    shapes = transformer_inputs(POLICY, VIDEO, 1, torch.float32)
    made = {
        name: torch.rand(value.shape, generator=generator) if isinstance(value, Tensor) else value
        for name, value in shapes.items()
    }
    made["hidden_states"].requires_grad_()
    return made


def train(mesh: Mesh, zero: dict[str, int], whole: bool = False) -> tuple[dict[str, Tensor], int]:
    """The trained weights, and elements that DeepSpeed fetches ahead.

    Args:
        whole: before each update a rank runs forwards with whole weights, one more than the rank before it.
    """
    torch.manual_seed(0)
    module = diffusers.WanTransformer3DModel.from_config(dict(TRANSFORMER))
    module.enable_gradient_checkpointing()
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0, **zero}
    learner = engine.Engine(
        module, OptimConfig(learning_rate=1e-2), {"zero_optimization": settings}, micro_batch_size=1,
        learning_rate_factor=lambda _: 1.0, block_classes=(type(module.blocks[0]),),
    )  # fmt: skip
    for update in range(UPDATES):
        with torch.no_grad(), learner.whole_weights() if whole else nullcontext():
            for _ in range(1 + whole * mesh.rank):
                learner.wrapped(**inputs(mesh, 1000 + update))
        for number in range(PASSES):
            loss = learner.wrapped(**inputs(mesh, PASSES * update + number))[0].square().mean()
            learner.backward(loss, last=number == PASSES - 1)
        learner.step()
    with learner.gathered(list(module.parameters())):
        weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return weights, learner.wrapped.optimizer.parameter_offload._prefetch_bucket_sz


def main(mesh: Mesh, output: str) -> None:
    alone, _ = train(mesh, NOTHING_AHEAD)
    default, default_ahead = train(mesh, {})
    by_blocks = {name: (0, blocks) for name, (_, blocks) in ds_config.FETCHING.items()}
    with patch.dict(ds_config.FETCHING, by_blocks):
        derived, derived_ahead = train(mesh, {})
    after_whole, _ = train(mesh, {}, whole=True)
    results = {
        "default": {name: torch.equal(value, alone[name]) for name, value in default.items()},
        "derived": {name: torch.equal(value, alone[name]) for name, value in derived.items()},
        "after whole weights": {name: torch.equal(value, alone[name]) for name, value in after_whole.items()},
        "ahead": [default_ahead, derived_ahead],
    }
    (Path(output) / f"rank{mesh.rank}.json").write_text(json.dumps(results))
