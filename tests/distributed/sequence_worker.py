"""Worker that runs one update per combination of family, tokens, ZeRO stage, sequence group and checkpointing.

    python -m tests.distributed.ranks sequence_worker OUTPUT [every]

Without `every`, checkpointing is on in half of the combinations, such that each pair of settings occurs.

Each update is plain SGD without clipping, compared with a single-process update, which every rank computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bpgo_video.config.bpgo import OptimConfig
from bpgo_video.distributed import engine, ulysses
from bpgo_video.distributed.mesh import Mesh, make_mesh
from bpgo_video.policies.attention import parallelise
from bpgo_video.policies.networks import compile_blocks
from tests.distributed.small_transformers import FAMILIES, LATENTS, SAMPLES, inputs, random_transformer, sample_losses

BLIND = "refiner_blocks.0.attn.to_k.bias"  # no key normalisation: softmax is invariant to a shift, so its gradient is 0
HUGE_STEP = 1e5  # the weights' change is the gradient, to many digits
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    family: str
    tokens: str
    stage: int
    sequence: int
    checkpointing: bool
    breaks_scaling: bool = False
    compiled: bool = False


def cases(world_size: int, every: bool) -> Iterator[Case]:
    sequences = [size for size in (1, 2, 4) if world_size % size == 0]
    settings = product(FAMILIES, LATENTS, (1, 2, 3), sequences, (False, True))
    for family, tokens, stage, sequence, checkpointing in settings:
        if every or checkpointing == ((tokens == "odd") ^ (stage == 2) ^ (sequence > 1)):
            yield Case(family, tokens, stage, sequence, checkpointing)
    if world_size > 1:
        yield Case("wan", "even", 1, world_size, checkpointing=False, breaks_scaling=True)
    if world_size == 2 and every:  # text in cross-attention and in joint attention
        for family, stage in product(("wan", "hunyuan"), (1, 3)):
            yield Case(family, "odd", stage, 2, checkpointing=stage == 3, compiled=True)


@cache
def reference(family: str, tokens: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, losses and gradients of a single process without any engine."""
    module = random_transformer(family)
    output, losses = sample_losses(module, *inputs(family, tokens))
    losses.mean().backward()
    return output.detach(), losses.detach(), {name: p.grad for name, p in module.named_parameters()}


def relative(found: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """L2 error relative to `size`, by default to the norm of the expected value."""
    return float((found - expected).norm() / (expected if size is None else size).norm())


def run(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Errors of one engine update against the reference."""
    module = random_transformer(case.family)
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    if case.checkpointing:
        module.enable_gradient_checkpointing()
    parallelise(module, mesh, FAMILIES[case.family].plan)
    if case.compiled:
        compile_blocks(module, FAMILIES[case.family].block_classes)
    learner = engine.Engine(
        module,
        OptimConfig(name="sgd", learning_rate=HUGE_STEP, max_grad_norm=0.0),
        {"zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0}},
        micro_batch_size=SAMPLES,
        learning_rate_factor=lambda _: 1.0,
        block_classes=FAMILIES[case.family].block_classes,
    )
    mine = mesh.share(SAMPLES, SAMPLES // mesh.data_size)[0]
    arguments, target = inputs(case.family, case.tokens)
    arguments = {name: value[mine] if torch.is_tensor(value) else value for name, value in arguments.items()}
    with torch.no_grad():
        rollout, _ = sample_losses(learner.wrapped, arguments, target[mine])
    output, losses = sample_losses(learner.wrapped, arguments, target[mine])
    learner.backward(losses.mean(), last=True)
    learner.step()
    expected, expected_losses, gradients = reference(case.family, case.tokens)
    errors = {}
    for name, parameter in learner.module.named_parameters():
        with learner.gathered([parameter]):
            size = gradients[name.replace("bias", "weight")] if name.endswith(BLIND) else None
            errors[name] = relative((start[name] - parameter.detach()) / HUGE_STEP, gradients[name], size)
    return {
        **asdict(case),
        "replay_is_exact": torch.equal(rollout, output),
        "output": relative(output.detach(), expected[mine]),
        "loss": relative(losses.detach(), expected_losses[mine]),
        "gradients": errors,
    }


def slice_only(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
    """A known bug of public trainers: the backward of the gather without the sum over ranks."""
    size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
    return grads[0].chunk(size, ctx.dim)[rank], None, None


def main(mesh: Mesh, output: str, *words: str) -> None:
    meshes = {size: make_mesh(CPU, size) for size in (1, 2, 4) if mesh.world_size % size == 0}
    results = []
    for case in cases(mesh.world_size, every="every" in words):
        right = ulysses.Gathered.backward
        if case.breaks_scaling:
            ulysses.Gathered.backward = staticmethod(slice_only)
        results.append(run(case, meshes[case.sequence]))
        ulysses.Gathered.backward = right
    (Path(output) / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
