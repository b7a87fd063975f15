"""Worker that builds policies for training under ZeRO-3 and writes the error of each.

python -m tests.distributed.ranks weights_worker OUTPUT FOLDER...

A FOLDER holds a pipeline, or one for each rank: FOLDER/0, FOLDER/1.
"""

from __future__ import annotations

import json
from pathlib import Path

from bpgo_video.distributed.mesh import Mesh
from bpgo_video.training.session import builder, sampling_policy
from tests.made.recipes import small_recipe


def error_of(folder: Path, mesh: Mesh) -> str:
    own = folder if (folder / "model_index.json").is_file() else folder / str(mesh.rank)
    config, zero3 = small_recipe(folder, folder, policy={"folder": str(own)}), {"zero_optimization": {"stage": 3}}
    try:
        sampling_policy(config, zero3, mesh, builder(zero3))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "none"


def main(mesh: Mesh, output: str, *folders: str) -> None:
    errors = {Path(folder).name: error_of(Path(folder), mesh) for folder in folders}
    (Path(output) / f"rank{mesh.rank}.json").write_text(json.dumps(errors))
