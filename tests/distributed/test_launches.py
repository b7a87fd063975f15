"""Launches with the deepspeed launcher: commands, a NaN on one rank, invalid arguments, and a used port."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bpgo_video.config.bpgo import Config
from bpgo_video.config.reading import to_yaml
from bpgo_video.training.metrics import read_metrics
from tests.distributed.conftest import free_port
from tests.made.recipes import ROOT, python_path, rewarded_by, small_recipe, without_evaluation

pytestmark = pytest.mark.slow


def run(command: list[str], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def launch(*arguments: str, port: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `deepspeed --num_accelerators 2` in the clone."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    return run([*launcher, "--master_port", str(port or free_port()), *arguments])


def recipe_file(config: Config, path: Path) -> str:
    path.write_text(to_yaml(config))
    return str(path)


def test_a_nan_on_one_rank_stops_all_and_keeps_the_checkpoint(tmp_path: Path, shards: Path) -> None:
    config = small_recipe(tmp_path / "run", shards, run={"num_steps": 5, "save_async": False})
    config = without_evaluation(rewarded_by(config, "tests.distributed.toy_rewards:NanOnSecondRank"))
    started = time.monotonic()
    result = launch("pipelines/train_video.py", "--config", recipe_file(config, tmp_path / "recipe.yaml"))
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "reward 'only' scored nan for sample 3 of prompt" in output
    assert time.monotonic() - started < 120
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-000002"
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


def test_a_reward_that_hangs_on_one_rank_ends_all(tmp_path: Path, shards: Path) -> None:
    config = without_evaluation(small_recipe(tmp_path / "run", shards))
    config = rewarded_by(config, "tests.distributed.toy_rewards:HangsOnSecondRank")
    config = replace(config, rewards={"only": replace(config.rewards["only"], timeout=2.0)})
    started = time.monotonic()
    result = launch("pipelines/train_video.py", "--config", recipe_file(config, tmp_path / "recipe.yaml"))
    assert result.returncode != 0
    message = (
        r"error: rank 1 .+ failed in phase reward .+ of prompt '.+' \(id -?\d+\) has not answered within .+ of 2 s"
    )
    assert re.search(message, result.stderr), result.stderr[-5000:]
    assert time.monotonic() - started < 90


def test_priors_are_estimated_and_used_from_the_command_line(tmp_path: Path, shards: Path) -> None:
    config = small_recipe(tmp_path / "run", shards, prior={"kind": "reference", "samples": 4}, run={"num_steps": 2})
    recipe = recipe_file(without_evaluation(config), tmp_path / "recipe.yaml")
    first = launch("pipelines/train_video.py", "--config", recipe)
    assert first.returncode != 0
    assert "bpgo-video priors --config" in first.stderr
    assert not (tmp_path / "run").exists(), "nothing is written before the input is validated"
    measured = launch("tools/estimate_priors.py", "--config", recipe)
    assert measured.returncode == 0, measured.stderr[-3000:]
    assert {path.stem for path in (shards / "priors").glob("*.json")} == set(config.rewards)
    trained = launch("pipelines/train_video.py", "--config", recipe)
    assert trained.returncode == 0, trained.stderr[-3000:]
    for name in ("metrics.jsonl", "config.yaml", "summary.json", "report.html", "checkpoints", "export"):
        assert (tmp_path / "run" / name).exists(), name
    again = launch("pipelines/train_video.py", "--config", recipe)
    assert again.returncode != 0
    assert "--run.resume auto" in again.stderr


def test_plain_python_starts_one_rank(tmp_path: Path, shards: Path) -> None:
    config = without_evaluation(small_recipe(tmp_path / "run", shards))
    command = [sys.executable, "pipelines/train_video.py", "--config", recipe_file(config, tmp_path / "recipe.yaml")]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_console_command_starts_ranks_in_any_folder_and_returns_their_exit_code(
    tmp_path: Path, shards: Path
) -> None:
    config = without_evaluation(small_recipe(tmp_path / "run", shards))
    recipe = recipe_file(config, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "bpgo_video", "train", "--ranks", "2", "--config", recipe]
    trained = run(command, tmp_path)
    assert trained.returncode == 0, trained.stderr[-3000:]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-000001" / "manifest.json").read_text())
    assert manifest["layout"]["world_size"] == 2
    again = run(command, tmp_path)
    assert again.returncode == 2
    assert "--run.resume auto" in again.stderr


def test_a_launch_on_a_used_port_ends_with_a_remedy(tmp_path: Path, shards: Path) -> None:
    config = without_evaluation(small_recipe(tmp_path / "run", shards))
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        recipe = recipe_file(config, tmp_path / "recipe.yaml")
        result = launch("pipelines/train_video.py", "--config", recipe, port=port)
    assert result.returncode == 2
    assert f"error: port {port} is in use by another process" in result.stderr
    assert "deepspeed --master_port N" in result.stderr


def test_the_doctor_distinguishes_a_healthy_recipe_from_a_constant_reward(tmp_path: Path, shards: Path) -> None:
    healthy = rewarded_by(
        without_evaluation(small_recipe(tmp_path / "run", shards)), "tests.distributed.toy_rewards:Redness"
    )
    result = launch("tools/doctor.py", "--config", recipe_file(healthy, tmp_path / "healthy.yaml"))
    assert result.returncode == 0, result.stderr
    assert "exactly 1 before the first update" in result.stdout
    assert "Ready to train" in result.stdout
    assert f"Next: bpgo-video train --config {tmp_path / 'healthy.yaml'} --ranks 2\n" in result.stdout
    assert not (tmp_path / "run").exists(), "nothing is saved"

    blind = rewarded_by(healthy, "tests.distributed.toy_rewards:Blind")
    result = launch("tools/doctor.py", "--config", recipe_file(blind, tmp_path / "blind.yaml"))
    assert result.returncode == 1
    assert "only gives all 4 samples of a prompt the same score" in " ".join(result.stdout.replace("│", " ").split())
    assert "Not ready: fix rewards first" in result.stdout
    assert f"Then repeat: bpgo-video doctor --config {tmp_path / 'blind.yaml'} --ranks 2\n" in result.stdout
