"""Agreement of two ranks: both run every case and record the error that they raised.

    python -m tests.distributed.ranks agreement_worker OUTPUT

For some names rank 1 gets a different folder than rank 0, as on a node without shared storage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_main, same_everywhere
from bpgo_video.training.run_folder import check_shared


def fails_on(failing: int, mesh: Mesh) -> None:
    with all_or_none(mesh):
        if mesh.rank == failing:
            raise FileNotFoundError("the model is missing")


def everyone_fails(mesh: Mesh) -> None:
    with all_or_none(mesh):
        raise FileNotFoundError(f"seen by {mesh.rank}")


def other_shards(mesh: Mesh) -> None:
    same_everywhere({"recipe": "the same", "prompt shards": f"of rank {mesh.rank}"}, mesh)


def from_rank_0(mesh: Mesh) -> None:
    assert from_main(f"said by {mesh.rank}", mesh) == "said by 0"
    same_everywhere({"recipe": "the same"}, mesh)


def cases(output: Path, rank: int) -> Mapping[str, Callable[[Mesh], None]]:
    local_disk = output / f"disk-of-{rank}"
    local_disk.mkdir()
    return {
        "one fails": lambda mesh: fails_on(1, mesh),
        "main fails": lambda mesh: fails_on(0, mesh),
        "everyone fails": everyone_fails,
        "other shards": other_shards,
        "from rank 0": from_rank_0,
        "shared folder": lambda mesh: check_shared(output / "shared" / "run", mesh, patience=1.0),
        "own folders": lambda mesh: check_shared(local_disk / "run", mesh, patience=1.0),
    }


def main(mesh: Mesh, folder: str) -> None:
    output = Path(folder)
    errors = {}
    for name, case in cases(output, mesh.rank).items():
        try:
            case(mesh)
            errors[name] = None
        except (ConfigError, FileNotFoundError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    (output / f"rank{dist.get_rank()}.json").write_text(json.dumps(errors))
