"""Worker that measures the error of transformer buffers constructed sharded in bf16.

python -m tests.distributed.ranks buffers_worker OUTPUT FOLDER...
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.sharded_build import build_sharded
from bpgo_video.policies.networks import networks_of

ZERO3_BF16 = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}


def errors(folder: Path) -> dict[str, float]:
    model_class = networks_of(folder)["transformer"]
    exact = dict(model_class.from_pretrained(folder / "transformer").named_buffers())
    found = build_sharded(ZERO3_BF16, model_class, folder / "transformer", torch.bfloat16).named_buffers()
    return {f"{folder.name}.{name}": float((buffer - exact[name]).abs().max()) for name, buffer in found}


def main(mesh: Mesh, output: str, *folders: str) -> None:
    found = {name: error for folder in folders for name, error in errors(Path(folder)).items()}
    (Path(output) / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
