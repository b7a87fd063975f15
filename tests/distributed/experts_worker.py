"""Worker for a policy of two transformers on two ranks: engine updates that use one, the other, or both.

    python -m tests.distributed.ranks experts_worker FOLDER OUTPUT DEEPSPEED_CONFIG ...

The reference is torch's AdamW in one process, which skips parameters without a gradient.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bpgo_video.config.bpgo import OptimConfig
from bpgo_video.config.deepspeed import read_ds_config, zero_stage
from bpgo_video.distributed import engine
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.gathering import WhenGathered, missing_bytes
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.sharded_build import build_sharded
from bpgo_video.policies import Policy
from bpgo_video.policies.networks import blocks_of, from_pretrained
from bpgo_video.rollouts.conditioning import cast
from tests.distributed.family_worker import inputs_of, whole
from tests.families import CASES

HIGH, LOW = torch.tensor(0.95), torch.tensor(0.4)  # noise levels of the first and of the second transformer
UPDATES = ((HIGH, LOW), (HIGH, HIGH), (LOW, HIGH), (LOW,), (HIGH, LOW, HIGH))
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.1, eps=1e-3, max_grad_norm=0.5)
CASE = CASES["wan22"]
Inputs = tuple[Tensor, dict[str, Tensor], Tensor]


def loss_of(policy: Policy, inputs: Inputs, sigma: Tensor) -> Tensor:
    latents, conditioning, target = inputs
    return (policy.velocity(latents, sigma, conditioning) - target).square().mean()


def reference(folder: Path, inputs: Inputs) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Weights and gradient norm after each update."""
    policy = CASE.policy(folder, components=("transformer",))
    parameters = list(policy.transformers.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=OPTIM.learning_rate, weight_decay=OPTIM.weight_decay, eps=OPTIM.eps, betas=OPTIM.betas
    )
    weights, norms = [], []
    for update in UPDATES:
        for sigma in update:
            (loss_of(policy, inputs, sigma) / len(update)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, OPTIM.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weights.append({name: p.detach().clone() for name, p in policy.transformers.named_parameters()})
    return weights, norms


class Learner:
    """The engine for the policy's transformers on this rank, which has one of the two samples."""

    def __init__(self, folder: Path, ds_config: dict[str, Any], inputs: Inputs, mesh: Mesh, average: str) -> None:
        build = partial(build_sharded, ds_config) if zero_stage(ds_config) == 3 else from_pretrained
        dtype = compute_dtype(ds_config)
        self.policy = CASE.policy(folder, components=("transformer",), build=build, dtype=dtype)
        for module in self.policy.transformers.values():
            module.enable_gradient_checkpointing()
        optim = replace(OPTIM, average=average, parameters="gathered") if average else OPTIM
        self.engine = engine.Engine(
            self.policy.transformers, optim, ds_config, micro_batch_size=1, learning_rate_factor=lambda _: 1.0,
            block_classes=blocks_of(self.policy.transformers, self.policy.block_names),
        )  # fmt: skip
        if average:
            self.engine.gathers = WhenGathered("gathered", self.engine.wrapped, mesh)
        self.policy.transformers = self.engine.wrapped
        latents, conditioning, target = inputs
        mine = slice(mesh.rank, mesh.rank + 1)
        own = cast({name: value[mine] for name, value in conditioning.items()}, dtype)
        self.inputs = (latents[mine], own, target[mine])

    def update(self, number: int) -> float:
        """Run a rollout through both transformers, sharded or gathered, then update `number`; the gradient norm."""
        with torch.no_grad(), self.engine.whole_weights() if number % 2 else nullcontext():
            for sigma in (HIGH, LOW, HIGH):
                loss_of(self.policy, self.inputs, sigma)
        levels = UPDATES[number]
        with self.engine.replaying():
            for place, sigma in enumerate(levels, start=1):
                loss = loss_of(self.policy, self.inputs, sigma)
                self.engine.backward(loss / len(levels), last=place == len(levels))
        return self.engine.step()


def run(folder: Path, scratch: Path, name: str, inputs: Inputs, mesh: Mesh) -> dict[str, Any]:
    """Errors of each update, and of the last ones by a second engine that resumes from the first one's checkpoint.

    Args:
        name: a DeepSpeed JSON, `zero3`; with gathered weights, when gradients are averaged, `zero3-update`.
    """
    json_name, _, average = name.partition("-")
    ds_config = read_ds_config(f"ds_configs/{json_name}.json")
    expected, norms = reference(folder, inputs)
    first = Learner(folder, ds_config, inputs, mesh, average)
    held = first.engine.module.parameters()  # in bf16, some modules stay in fp32
    size = sum(getattr(weight, "ds_numel", weight.numel()) * weight.element_size() for weight in held)
    missing = missing_bytes(first.engine.wrapped) / size
    errors, found_norms, moved = [], [], []
    for number in range(len(UPDATES)):
        if number == 3:
            first.engine.save(scratch, "saved", {})
        before = whole(first.engine)
        found_norms.append(first.update(number))
        after = whole(first.engine)
        errors.append(largest_error(after, expected[number]))
        changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
        moved.append(sorted({name.partition(".")[0] for name in changed}))
    second = Learner(folder, ds_config, inputs, mesh, average)
    second.engine.load(scratch, "saved")
    for number in range(3, len(UPDATES)):
        second.update(number)
    last, again = whole(first.engine), whole(second.engine)
    return {
        "errors": errors,
        "norms": [found / norm - 1 for found, norm in zip(found_norms, norms, strict=True)],
        "resumed": all(torch.equal(last[name], again[name]) for name in last),
        "moved": moved,
        "missing": missing,
    }


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - weight).abs().max()) for name, weight in expected.items())


def main(mesh: Mesh, pipeline: str, results_folder: str, *names: str) -> None:
    folder, output = Path(pipeline), Path(results_folder)
    inputs = inputs_of(CASE, folder)
    results = {name: run(folder, output / name, name, inputs, mesh) for name in names}
    (output / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
