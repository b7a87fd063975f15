"""The wheel: installed alone in an empty environment, it builds shards and trains from the console."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from bpgo_video.config.reading import RECIPES, shipped
from bpgo_video.training.metrics import read_metrics
from tests.made.recipes import ROOT
from tests.package.conftest import run

PROGRAM = """
import sys
from importlib.resources import files
from pathlib import Path
import bpgo_video
assert Path(bpgo_video.__file__).is_relative_to(Path(sys.prefix)), bpgo_video.__file__
from bpgo_video.policies import load_policy
from bpgo_video.rewards.tiny_rewards import LearnedMotion
from bpgo_video.rewards.text import ClipScore
policy = load_policy("package:bpgo_video.tiny/weights/wan", max_sequence_length=16)
embeddings = policy.encode(["a red circle moving left"])["prompt_embeds"]
assert embeddings.abs().sum() > 0
ClipScore("package:bpgo_video.tiny/weights/clip")
LearnedMotion("package:bpgo_video.tiny/weights/motion")
assert files("bpgo_video.recipes").joinpath("tiny_wan_bpgo.yaml").is_file()
print(files("bpgo_video.tiny").joinpath("prompts.jsonl"))
print(sum(p.numel() for p in policy.transformers["transformer"].parameters()))
"""
TWO_SMALL_STEPS = [
    *("--run.num-steps", "2", "--rollout.prompts-per-step", "2"),
    *("--prior.kind", "constant", "--prior.mean", "0.1", "--prior.scale", "0.1"),
    *("--evaluation.samples-per-prompt", "1", "--evaluation.num-steps", "2", "--evaluation.videos", "1"),
]


def test_wheel_and_sdist_contain_only_the_package(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kept = {
        Path(folder, name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / "bpgo_video", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }
    assert held == kept
    assert "bpgo_video/py.typed" in held


def test_the_wheel_works_in_an_empty_environment_outside_the_clone(binaries: Path, tmp_path: Path) -> None:
    prompts, parameters = run([binaries / "python", "-c", PROGRAM], tmp_path).splitlines()[-2:]
    assert len(Path(prompts).read_text().splitlines()) == 96
    assert int(parameters) > 500_000


def test_the_installed_wheel_builds_shards_and_trains(binaries: Path, tmp_path: Path) -> None:
    console = binaries / "bpgo-video"
    listed = run([console, "recipes"], tmp_path)
    assert all(name in listed for name in shipped(RECIPES))
    texts = ["a red circle moving left", "a blue square moving up", "a red object", "a green triangle moving right"]
    lines = [f'{{"prompt": "{text}"}}\n' for text in texts] + ['{"prompt": "a shape", "split": "heldout"}\n']
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    policy = ["--policy", "package:bpgo_video.tiny/weights/wan", "--max-sequence-length", "16"]
    run([console, "prompts", "build", "--input", "prompts.jsonl", "--output", "runs/demo-prompts", *policy], tmp_path)
    run([console, "train", "--config", "tiny_wan_bpgo", *TWO_SMALL_STEPS], tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path / "runs" / "demo" / "metrics.jsonl")] == [0, 1]
    for name in ("checkpoints/step-000002", "export/model_index.json", "report.html"):
        assert (tmp_path / "runs" / "demo" / name).exists(), name


def test_embedded_weights_stay_small() -> None:
    weights = ROOT / "bpgo_video" / "tiny" / "weights"
    names = ("wan", "clip")
    sizes = {name: sum(p.stat().st_size for p in (weights / name).rglob("*") if p.is_file()) for name in names}
    assert sizes["wan"] <= 8 * 2**20
    assert sizes["clip"] <= 4 * 2**20
