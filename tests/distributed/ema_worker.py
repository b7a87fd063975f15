"""Worker that trains a small model with an EMA of its weights under each ZeRO stage.

python -m tests.distributed.ranks ema_worker OUTPUT
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.func import functional_call

from bpgo_video.config.bpgo import EmaConfig, OptimConfig
from bpgo_video.distributed import engine
from bpgo_video.distributed.ema import EMA, AverageParameters, save_average
from bpgo_video.distributed.mesh import Mesh

CONFIG = EmaConfig(decay=0.8)
UPDATES = 4
CASES = list(product((1, 2, 3), ("float32", "bfloat16"), (0, 10**6)))  # stage, dtype, persistence threshold


class Block(nn.Module):
    """Layer sizes that no number of ranks divides; the first layer is frozen, as the base model under adapters is."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 11), nn.Linear(11, 3)
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(self.frozen(inputs)).tanh())


def build(stage: int, dtype: str, persistent: int) -> engine.Engine:
    torch.manual_seed(0)
    ds_config: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": persistent},
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    return engine.Engine(
        Block().to(getattr(torch, dtype)),
        OptimConfig(learning_rate=0.05, max_grad_norm=1.0),
        ds_config,
        micro_batch_size=4,
        learning_rate_factor=lambda _: 1.0,
        block_classes=(Block,),
    )


def inputs(number: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(1000 * number + dist.get_rank())).to(dtype)


def update(learner: engine.Engine, number: int, dtype: torch.dtype, between: EMA | None = None) -> None:
    """One update; with an average, it is swapped in between forward and backward."""
    output = learner.wrapped(inputs(number, dtype).requires_grad_())  # as replay does, to run the hooks of ZeRO-3
    if between is not None:
        with between.weights(), torch.no_grad():
            learner.wrapped(inputs(number + 1, dtype))
    learner.backward(output.float().square().mean(), last=True)
    learner.step()


def computed_with(learner: engine.Engine) -> dict[str, Tensor]:
    """The model's gathered parameters."""
    found = {}
    for name, parameter in learner.module.named_parameters():
        with learner.gathered([parameter]):
            found[name] = parameter.detach().clone()
    return found


def masters(learner: engine.Engine) -> dict[str, Tensor]:
    named = learner.module.named_parameters()
    return {name: safe_get_full_fp32_param(p).double() for name, p in named if p.requires_grad}


def run(stage: int, dtype_name: str, persistent: int, folder: Path) -> dict[str, Any]:
    dtype = getattr(torch, dtype_name)
    learner, twin = build(stage, dtype_name, persistent), build(stage, dtype_name, persistent)
    ema = EMA(learner.masters, CONFIG)
    expected = masters(learner)
    for number in range(UPDATES):
        update(learner, number, dtype)
        update(twin, number, dtype)
        ema.update()
        keep = min(CONFIG.decay, (1 + number) / (10 + number))
        expected = {name: keep * expected[name] + (1 - keep) * new for name, new in masters(learner).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_average(ema, folder, dist.get_rank())
    dist.barrier()
    average = AverageParameters(folder)

    before = computed_with(learner)
    with ema.weights():
        inside = computed_with(learner)
        with torch.no_grad():
            output = learner.wrapped(inputs(99, dtype))
        with learner.whole_weights(), torch.no_grad():
            gathered = learner.wrapped(inputs(99, dtype))
    after = computed_with(learner)
    reference = Block().to(dtype)
    frozen = {name: tensor for name, tensor in before.items() if name not in average}
    with torch.no_grad():
        reference_output = functional_call(
            reference, {**frozen, **{name: tensor.to(dtype) for name, tensor in average.items()}}, inputs(99, dtype)
        )

    for number in range(UPDATES, UPDATES + 2):
        update(learner, number, dtype, between=ema)
        update(twin, number, dtype)
    unswapped = computed_with(twin)
    return {
        "stage": stage, "dtype": dtype_name, "persistent": persistent,
        "elements": sum(shard.values.numel() for shard in ema.shards),
        "error": max(float((average[name] - value).abs().max()) for name, value in expected.items()),
        "names": sorted(average),
        "inside": all(torch.equal(inside[name], tensor.to(dtype)) for name, tensor in average.items()),
        "moved": all(not torch.equal(inside[name], before[name]) for name in average),
        "restored": all(torch.equal(after[name], before[name]) for name in before),
        "output": bool((output - reference_output).abs().max() <= 1e-6 * reference_output.abs().max()),
        "gathered": torch.equal(output, gathered),
        "trains on": all(torch.equal(tensor, unswapped[name]) for name, tensor in computed_with(learner).items()),
    }  # fmt: skip


def main(mesh: Mesh, folder: str) -> None:
    output = Path(folder)
    results = [run(*case, output / "-".join(map(str, case))) for case in CASES]
    (output / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
