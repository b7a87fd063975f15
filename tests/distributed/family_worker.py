"""Worker for one family on two ranks: a sharded or sequence-parallel update, compared with a single process.

    python -m tests.distributed.ranks family_worker FAMILY FOLDER OUTPUT

Plain SGD without clipping; the weights' change is the gradient.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bpgo_video.config.bpgo import OptimConfig
from bpgo_video.config.deepspeed import zero_stage
from bpgo_video.distributed import engine
from bpgo_video.distributed.mesh import Mesh, make_mesh
from bpgo_video.distributed.sharded_build import build_sharded
from bpgo_video.policies import Policy
from bpgo_video.policies.attention import parallelise
from bpgo_video.policies.networks import Build, blocks_of, from_pretrained
from tests.families import CASES, Case

HUGE_STEP = 1e5  # the weights' change is the gradient, to many digits
SIGMA = torch.tensor(0.95)
PARALLEL = ((1, 1), (3, 1), (1, 2), (3, 2))  # ZeRO stage, ranks of a sequence group


def build_for(ds_config: dict[str, Any]) -> Build:
    return partial(build_sharded, ds_config) if zero_stage(ds_config) == 3 else from_pretrained


def one_loss(policy: Policy, inputs: tuple[Tensor, dict[str, Tensor], Tensor]) -> Tensor:
    """A loss with a different weight for every element."""
    latents, conditioning, target = inputs
    return (policy.velocity(latents, SIGMA, conditioning) - target).square().mean()


def inputs_of(case: Case, folder: Path) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Inputs for two samples of two prompts."""
    policy = case.policy(folder)
    prompts = case.prompts(policy, case.recipe(folder))
    generator = torch.Generator().manual_seed(1)
    latents, target = (torch.randn(2, *policy.latent_shape(case.video), generator=generator) for _ in range(2))
    return latents, dict(prompts.conditioning), target


def reference(case: Case, folder: Path, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a single process."""
    policy = case.policy(folder, components=("transformer",))
    loss = one_loss(policy, inputs)
    loss.backward()
    named = policy.transformers.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}


def run(case: Case, folder: Path, stage: int, mesh: Mesh, inputs: Any) -> dict[str, Any]:
    """Loss of one engine update, and the gradients of all parameters with a reference gradient."""
    ds_config = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    policy = case.policy(folder, components=("transformer",), build=build_for(ds_config))
    for module in policy.transformers.values():
        if mesh.sequence > 1:  # without checkpointing otherwise: transformers then call their blocks differently
            module.enable_gradient_checkpointing()
        parallelise(module, mesh, policy.sequence_plan)
    learner = engine.Engine(
        policy.transformers,
        OptimConfig(name="sgd", learning_rate=HUGE_STEP, max_grad_norm=0.0),
        ds_config,
        micro_batch_size=2,
        learning_rate_factor=lambda _: 1.0,
        block_classes=blocks_of(policy.transformers, policy.block_names),
    )
    start = whole(learner)
    policy.transformers = learner.wrapped
    mine = mesh.share(2, 2 // mesh.data_size)[0]
    latents, conditioning, target = inputs
    sample = (latents[mine], {name: value[mine] for name, value in conditioning.items()}, target[mine])
    loss = one_loss(policy, sample)
    learner.backward(loss, last=True)
    learner.step()
    stepped = whole(learner)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return {
        "loss": float(total / dist.get_world_size()),
        "gradients": {name: (start[name] - stepped[name]) / HUGE_STEP for name in start},
    }


def whole(learner: engine.Engine) -> dict[str, Tensor]:
    found = {}
    for name, parameter in learner.module.named_parameters():
        with learner.gathered([parameter]):
            found[name] = parameter.detach().clone()
    return found


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """L2 errors relative to each gradient's norm, or to a thousandth of the total norm for nearly zero gradients."""
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    return {
        name: float((found[name] - gradient).norm() / max(gradient.norm(), 1e-3 * total))
        for name, gradient in expected.items()
    }


def main(mesh: Mesh, family: str, pipeline: str, output: str) -> None:
    folder, case = Path(pipeline), CASES[family]
    inputs = inputs_of(case, folder)
    loss, gradients = reference(case, folder, inputs)
    results = []
    for stage, sequence in PARALLEL:
        found = run(case, folder, stage, make_mesh(torch.device("cpu"), sequence), inputs)
        results.append(
            {
                "stage": stage,
                "sequence": sequence,
                "loss": abs(found["loss"] / float(loss) - 1),
                "gradients": errors(found["gradients"], gradients),
            }
        )
    (Path(output) / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
