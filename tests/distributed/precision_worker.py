"""Worker for the precision contract: construction and one update of a small Wan transformer.

    python -m tests.distributed.ranks precision_worker OUTPUT FOLDER

It covers every combination of reported fp16 and bf16 support, every ZeRO stage, and both precisions. The reference is
plain torch: bf16 weights with fp32 masters, the modules that diffusers keeps in fp32 left in fp32, gradients averaged
over the ranks' batches. Plain SGD without clipping.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from bpgo_video.config.bpgo import EmaConfig, OptimConfig
from bpgo_video.distributed import engine
from bpgo_video.distributed.ema import EMA
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.sharded_build import build_sharded
from bpgo_video.policies.networks import Transformers, blocks_of, from_pretrained, networks_of

RATE = 0.5
BOTH = (True, False)
SETTINGS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero3-persistent": {"stage": 3},
    "zero3-offload": {
        "stage": 3, "stage3_param_persistence_threshold": 0,
        "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"},
    },
}  # fmt: skip


def batch(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    latents = torch.randn(2, 4, 3, 8, 8, generator=generator)
    texts = torch.randn(2, 5, 16, generator=generator)
    return {"hidden_states": latents.to(dtype), "timestep": torch.tensor([700.0, 300.0]),
            "encoder_hidden_states": texts.to(dtype), "return_dict": False}  # fmt: skip


def one_loss(output: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)  # all elements differ
    return (weights * output.float()).sum()


def reference(model_class: Any, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter after one update, in its own dtype."""
    model: nn.Module = model_class.from_pretrained(folder, torch_dtype=dtype)
    gradients: dict[str, Tensor] = {}
    for rank in range(dist.get_world_size()):
        one_loss(model(**batch(rank, dtype))[0]).backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.float() / dist.get_world_size()
            gradients[name] = gradients.get(name, 0) + gradient
            parameter.grad = None
    return {
        name: (parameter.detach().float() - RATE * gradients[name]).to(parameter.dtype)
        for name, parameter in model.named_parameters()
    }


def build(model_class: Any, folder: Path, dtype: torch.dtype, zero: dict[str, Any]) -> engine.Engine:
    ds_config = {"zero_optimization": zero, "bf16": {"enabled": dtype == torch.bfloat16}}
    construct = from_pretrained if zero["stage"] < 3 else engine_build(ds_config)
    transformers = Transformers({"transformer": construct(model_class, folder, dtype)})
    return engine.Engine(
        transformers,
        OptimConfig(name="sgd", learning_rate=RATE, max_grad_norm=0.0),
        ds_config,
        micro_batch_size=2,
        learning_rate_factor=lambda _: 1.0,
        block_classes=blocks_of(transformers, ("WanTransformerBlock",)),
    )


def whole(learner: engine.Engine) -> dict[str, Tensor]:
    """The gathered tensors with which the model computes."""
    found = {}
    for name, parameter in learner.module["transformer"].named_parameters():
        with learner.gathered([parameter]):
            found[name] = parameter.detach().clone()
    return found


def update(learner: engine.Engine, dtype: torch.dtype) -> None:
    loss = one_loss(learner.wrapped("transformer", **batch(dist.get_rank(), dtype))[0])
    learner.backward(loss, last=True)
    learner.step()


def afterwards(learner: engine.Engine, twin: engine.Engine, start: dict[str, Tensor], saves: Path) -> dict[str, Any]:
    """Swap an average in and out, and resume another engine from a checkpoint."""
    ema = EMA(learner.masters, EmaConfig(decay=0.5, warmup=False))
    update(learner, learner.dtype)
    ema.update()
    end = whole(learner)
    with ema.weights():
        inside = whole(learner)
    learner.save(saves, "saved", {})
    dist.barrier()
    twin.load(saves, "saved")
    halfway = {name: (start[name] + end[name]) / 2 for name in end if end[name].dtype == torch.float32}
    return {
        "average": max(float((inside[name] - value).norm() / value.norm()) for name, value in halfway.items()),
        "restored": all(torch.equal(value, end[name]) for name, value in whole(learner).items()),
        "resumed": all(torch.equal(value, end[name]) for name, value in whole(twin).items()),
        "moved": all(not torch.equal(inside[name], end[name]) for name in halfway),
    }


def engine_build(ds_config: dict[str, Any]) -> Any:
    return lambda *arguments: build_sharded(ds_config, *arguments)


def error(found: dict[str, Tensor], expected: dict[str, Tensor], kept: bool) -> float:
    """The largest relative error of a tensor that stays in fp32 (`kept`), or of the others."""
    chosen = {name: value for name, value in expected.items() if (value.dtype == torch.float32) == kept}
    assert all(found[name].dtype == value.dtype for name, value in chosen.items())
    errors = [float((found[name].float() - value.float()).norm()) for name, value in chosen.items()]
    sizes = [float(value.float().norm()) for value in chosen.values()]
    return max((error / (size or 1.0) for error, size in zip(errors, sizes, strict=True)), default=0.0)


def main(mesh: Mesh, results_folder: str, pipeline: str) -> None:
    output, folder = Path(results_folder), Path(pipeline)
    model_class, transformer = networks_of(folder)["transformer"], folder / "transformer"
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        expected = reference(model_class, transformer, dtype)
        for (fp16, bf16), name in product(product(BOTH, BOTH), SETTINGS):
            if name != "zero3" and not (fp16 and bf16):
                continue
            accelerator = type(get_accelerator())
            accelerator.is_fp16_supported = lambda _, answer=fp16: answer
            accelerator.is_bf16_supported = lambda _, answer=bf16: answer
            learner = build(model_class, transformer, dtype, SETTINGS[name])
            update(learner, dtype)
            found = whole(learner)
            case = f"{str(dtype).removeprefix('torch.')} {name} fp16={fp16} bf16={bf16}"
            results[case] = {"kept": error(found, expected, True), "others": error(found, expected, False)}
            if fp16 and bf16:
                twin = build(model_class, transformer, dtype, SETTINGS[name])
                results[case] |= afterwards(learner, twin, found, output / case.replace(" ", "-"))
    (output / f"rank{dist.get_rank()}.json").write_text(json.dumps(results, indent=1))
