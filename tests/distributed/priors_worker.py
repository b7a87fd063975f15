"""Worker that measures priors and writes the anchors and what this rank held while it sampled.

python -m tests.distributed.ranks priors_worker SHARDS OUTPUT NAME=STAGE:SEQUENCE:PARAMETERS[:DIES] ...

With DIES the rank ends at once after so many rounds.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from bpgo_video.config.bpgo import Config
from bpgo_video.config.run import ParallelConfig
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh, make_mesh
from bpgo_video.training import priors
from tests.made.recipes import rewarded_by, small_recipe

score_group = priors.score_group


def recipe(shards: Path, folder: Path, stage: str, sequence: str, parameters: str) -> Config:
    """All four prompts, two pairs of each; under ZeRO-3 no weight is too small to be sharded."""
    config = small_recipe(
        folder,
        shards,
        run={"num_steps": 2},
        prior={"kind": "reference", "samples": 4},
        rollout={"parameters": parameters},
        sampler={"num_steps": 5, "train_steps": "random", "train_fraction": 0.5},
    )
    zero = {"stage": int(stage), "stage3_param_persistence_threshold": 0}
    ds_config = folder.with_suffix(".json")
    ds_config.write_text(json.dumps({"zero_optimization": zero}))
    config = rewarded_by(config, "tests.distributed.toy_rewards:Redness")
    return replace(config, deepspeed=str(ds_config), parallel=ParallelConfig(sequence=int(sequence)))


def measure(mesh: Mesh, config: Config, dies: int | None) -> dict[str, Any]:
    sharded: list[float] = []

    def watched(*arguments: Any) -> Any:
        parameters = list(arguments[1].transformers.parameters())
        states = [getattr(parameter, "ds_status", None) for parameter in parameters]
        sharded.append(sum(state is ZeroParamStatus.NOT_AVAILABLE for state in states) / len(states))
        if dies is not None and len(sharded) > dies:
            os._exit(1)
        return score_group(*arguments)

    priors.score_group = watched  # type: ignore[assignment]
    with Heartbeat(mesh, timeout=60) as heartbeat:
        table = priors.estimate_priors(config, make_mesh(mesh.device, config.parallel.sequence), heartbeat)["only"]
    return {"anchors": table.anchors, "scale": table.scale, "sharded": sharded}


def main(mesh: Mesh, shards: str, output: str, *cases: str) -> None:
    for case in cases:
        name, _, words = case.partition("=")
        *words, dies = words.split(":") if words.count(":") == 3 else [*words.split(":"), ""]
        copy = Path(output) / f"{name}-shards"
        if mesh.is_main:
            shutil.copytree(shards, copy, dirs_exist_ok=True)
            config = recipe(copy, Path(output) / name, *words)
        mesh.barrier()
        config = recipe(copy, Path(output) / name, *words)
        found = measure(mesh, config, int(dies) if dies else None)
        (Path(output) / f"{name}-rank{mesh.rank}.json").write_text(json.dumps(found))
