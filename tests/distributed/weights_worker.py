"""Worker that builds transformers sharded and writes the error of each.

python -m tests.distributed.ranks weights_worker OUTPUT FOLDER...
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bpgo_video.distributed import engine
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies.networks import networks_of


def error_of(folder: Path) -> str:
    settings = {"zero_optimization": {"stage": 3}}
    try:
        engine.build_sharded(settings, networks_of(folder)["transformer"], folder / "transformer", torch.float32)
    except ValueError as error:
        return str(error)
    return "none"


def main(mesh: Mesh, output: str, *folders: str) -> None:
    errors = {Path(folder).name: error_of(Path(folder)) for folder in folders}
    (Path(output) / f"rank{mesh.rank}.json").write_text(json.dumps(errors))
