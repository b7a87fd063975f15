"""Worker that counts all allocations during two updates under each ZeRO stage.

python -m tests.distributed.ranks memory_worker OUTPUT
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from bpgo_video.config.bpgo import OptimConfig, VideoConfig
from bpgo_video.config.policy import LoraConfig
from bpgo_video.distributed import engine
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.planning.fake import Allocations
from bpgo_video.planning.footprint import transformer_inputs
from bpgo_video.planning.models import Model, policy_of
from bpgo_video.policies.lora import add_lora
from bpgo_video.policies.networks import repeated_blocks

BUCKET = 4_000_000
MODEL = Model(
    name="medium",
    source="this test",
    index={"_class_name": "WanPipeline"},
    transformers=("transformer",),
    transformer={
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 8,
        "out_channels": 8, "text_dim": 64, "freq_dim": 64, "ffn_dim": 1024, "num_layers": 10,
    },
    vae={"_class_name": "AutoencoderKLWan", "z_dim": 8},
)  # fmt: skip
POLICY = policy_of(MODEL, family=None, max_sequence_length=16)
VIDEO, SAMPLES = VideoConfig(num_frames=13, height=128, width=128, fps=16.0), 2
CASES = {  # ZeRO stage, rank of adapters, activation checkpointing
    "zero1": (1, 0, True),
    "zero2": (2, 0, True),
    "zero3": (3, 0, True),
    "zero3 keeping all activations": (3, 0, False),
    "zero3 training adapters": (3, 8, False),
}


def zero(stage: int) -> dict[str, Any]:
    """A low limit on live parameters, so that stage 3 fetches and frees blocks as it does for large models."""
    few = {"stage3_max_live_parameters": 2e6, "stage3_max_reuse_distance": 2e6, "stage3_prefetch_bucket_size": 1e6}
    settings = {"stage": stage, "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    return {"zero_optimization": {**settings, **(few if stage == 3 else {})}}


def measure(stage: int, lora_rank: int, checkpointing: bool) -> dict[str, int]:
    """Bytes between updates, and peak bytes of each phase of the second update, which has two passes."""
    with Allocations() as counted:
        module = diffusers.WanTransformer3DModel.from_config(dict(MODEL.transformer))
        if lora_rank:
            add_lora(module, LoraConfig(rank=lora_rank), seed=0)
        if checkpointing:
            module.enable_gradient_checkpointing()
        learner = engine.Engine(
            module, OptimConfig(), zero(stage), micro_batch_size=SAMPLES, learning_rate_factor=lambda _: 1.0,
            block_classes=(type(repeated_blocks(module)[0]),),
        )  # fmt: skip
        one_update(learner, counted)
        return one_update(learner, counted)


def one_update(learner: engine.Engine, counted: Allocations) -> dict[str, int]:
    counted.mark()
    found = {"rest": counted.live}
    with torch.no_grad():
        learner.wrapped(**inputs())
    found["denoise"] = counted.mark()
    for last in (False, True):
        taken_in = inputs()
        taken_in["hidden_states"].requires_grad_()
        loss = learner.wrapped(**taken_in)[0].square().mean()
        learner.backward(loss, last=last)
        del taken_in, loss
    found["replay"] = counted.mark()
    learner.step()
    found["update"] = counted.mark()
    return found


def inputs() -> dict[str, Any]:
    shapes = transformer_inputs(POLICY, VIDEO, SAMPLES, torch.float32)
    return tree_map_only(torch.Tensor, lambda value: torch.zeros(value.shape, dtype=value.dtype), shapes)


def main(mesh: Mesh, output: str) -> None:
    found = {name: measure(*case) for name, case in CASES.items()}
    (Path(output) / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
