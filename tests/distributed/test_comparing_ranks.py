"""Model comparison on two ranks: scores bit-equal to those of one rank, and one report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bpgo_video.config.reading import to_yaml
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.evaluation.compare import Request, measure
from bpgo_video.evaluation.comparison import read_scores
from tests.distributed.conftest import free_port
from tests.made.random_wan import random_wan
from tests.made.recipes import ROOT, python_path
from tests.made.written_runs import tagged_recipe

pytestmark = pytest.mark.slow
LAUNCHER = Path(sys.executable).with_name("deepspeed")


def test_two_ranks_give_the_scores_of_one(tmp_path: Path) -> None:
    """Three prompts of two samples in micro-batches of four: samples repeated in the last ones count once."""
    recipe, other = tagged_recipe(tmp_path), random_wan(tmp_path / "other", seed=1)
    for part in ("text_encoder", "tokenizer"):
        for file in (tmp_path / "wan" / part).iterdir():
            (other / part / file.name).write_bytes(file.read_bytes())
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    command = [
        str(LAUNCHER), "--num_accelerators", "2", "--master_port", str(free_port()), "tools/evaluate.py", "compare",
        str(tmp_path / "wan"), str(other), "--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "two"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("No difference shown between wan and other") == 1
    content = json.loads((tmp_path / "two" / "comparison.json").read_text())
    requests = [Request(str(tmp_path / "wan"), "wan"), Request(str(other), "other")]
    alone = measure(requests, recipe, "raw", tmp_path / "one", Mesh(rank=0, world_size=1, device=torch.device("cpu")))
    for model, expected in zip(content["models"], alone, strict=True):
        assert read_scores(Path(model["results"])) == expected
    assert (tmp_path / "two" / "report.html").is_file()
