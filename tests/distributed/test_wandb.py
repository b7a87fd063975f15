"""Trackers on two ranks: one run in each, with the captions and scores of the training run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bpgo_video.config.reading import to_yaml
from tests.distributed.conftest import free_port
from tests.made.recipes import ROOT, python_path, small_recipe
from tests.made.wandb_files import history, offline_runs, table

pytestmark = pytest.mark.slow


def test_a_run_logs_its_heldout_videos_and_a_table_before_and_after_training(tmp_path: Path, shards: Path) -> None:
    """Three steps, with evaluations after the second and the last."""
    evaluation = {"every": 2, "videos": 2}
    config = small_recipe(tmp_path / "run", shards, run={"num_steps": 3}, evaluation=evaluation)
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    command = [*launcher, "--master_port", str(free_port()), "pipelines/train_video.py"]
    trackers = ["--trackers", "wandb", "tensorboard", "--wandb.project", "test", "--wandb.mode", "offline"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), "WANDB_DATA_DIR": str(tmp_path)}
    done = subprocess.run(
        [*command, "--config", str(tmp_path / "recipe.yaml"), *trackers],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1, "rank 0 alone opens trackers"
    (folder,) = offline_runs(tmp_path / "run")
    rows = history(folder)
    assert [row["_step"] for row in rows] == [0, 1, 2]
    assert ["heldout.captions" in row for row in rows] == [False, True, True]
    samples = json.loads((tmp_path / "run" / "samples" / "samples.json").read_text())
    reward = next(iter(config.evaluation.rewards))
    for sample, caption, video in zip(samples, rows[2]["heldout.captions"], rows[2]["heldout.videos"], strict=True):
        assert caption.startswith(f"{sample['prompt']} | {reward}: {sample['score_after']:.3g}")
        original = tmp_path / "run" / "samples" / "after" / f"{sample['index']:03d}.mp4"
        assert (folder / "files" / video["path"]).read_bytes() == original.read_bytes()
    for line, sample in zip(table(folder, "heldout_before_after"), samples, strict=True):
        assert line["prompt"] == sample["prompt"]
        for when in ("before", "after"):
            video = tmp_path / "run" / "samples" / when / f"{sample['index']:03d}.mp4"
            assert line[when] == video.read_bytes()
            assert line[f"{reward} {when}"] == pytest.approx(sample[f"score_{when}"], rel=1e-6)
