"""A user's first day: from the wheel in an empty folder to a trained, compared and measured model.

Run it alone with `pytest -s tests/package/test_first_day.py -m slow` to read what the user reads.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.package.conftest import outside

TEXTS = [
    *("a red circle moving left", "a blue square moving up", "a green triangle moving right", "a yellow object"),
    *("a red square", "a blue circle moving down", "a green object moving up", "a yellow triangle moving left"),
    *("a red triangle", "a blue object moving right", "a green square moving down", "a yellow circle moving up"),
]
RECIPE = """
base: tiny_wan_bpgo.yaml
run: {dir: runs/mine, num_steps: 10, save_every: 5}
data: {shards: runs/prompts}
rollout: {prompts_per_step: 2, micro_batch_size: 4}
evaluation: {every: 5, samples_per_prompt: 2, num_steps: 4}
"""
OWN_REWARD = """
from bpgo_video.rewards import Clips, FrameScores, RewardModel


class Brightness(RewardModel):
    name, version = "brightness", "1"

    def __call__(self, clips: Clips) -> FrameScores:
        return FrameScores(clips.videos.mean(dim=(2, 3, 4)), clips.times)
"""
OWN_RECIPE = """
base: mine.yaml
run: {dir: runs/own, num_steps: 2}
rewards:
  bright: {model: "brightness:Brightness"}
prior: {kind: ema}
"""
WAN = "package:bpgo_video.tiny/weights/wan"
BUILD = f"bpgo-video prompts build --policy {WAN} --max-sequence-length 16"
TWO_STEPS = "--run.num-steps 2 --ranks 2"

# A command, its exit code, and what the user must be told.
DAY: list[tuple[str, int, list[str]]] = [
    ("bpgo-video --help", 0, ["Start with `bpgo-video demo`"]),
    ("bpgo-video train --help", 0, ["bpgo-video train"]),
    ("bpgo-video trian", 2, ["perhaps you meant train"]),
    ("bpgo-video recipes", 0, ["tiny_wan_bpgo", "wan21_1.3b_240p_1x24gb"]),
    ("bpgo-video recipes copy tiny_wan_bpgoo", 2, ["perhaps you meant tiny_wan_bpgo"]),
    ("bpgo-video plan mine.yaml --gpus 2 --gigabytes 24", 0, ["24 GB: fits"]),
    ("bpgo-video train mine.yaml --ranks 2", 2, ["runs/prompts", "bpgo-video prompts"]),
    (
        f"{BUILD} --input prompts.txt --output runs/prompts --holdout 0.25",
        0,
        ["runs/prompts: 12 prompts", "heldout"],
    ),
    (f"{BUILD} --input prompts.parquet --output runs/from-parquet", 0, ["runs/from-parquet: 12 prompts"]),
    ("bpgo-video prompts stats runs/prompts", 0, ["heldout", "priors      none; bpgo-video priors makes them"]),
    ("bpgo-video train mine.yaml --ranks 2", 2, ["is missing", "bpgo-video priors"]),
    ("bpgo-video priors mine.yaml", 0, ["runs/prompts/priors/alignment.json", "s_ref"]),
    ("bpgo-video train mine.yaml --lr 1e-4", 2, ["--optim.learning-rate"]),
    ("bpgo-video doctor mine.yaml --ranks 2", 0, ["ratio"]),
    ("bpgo-video train mine.yaml --ranks 2", 0, ["held-out oracle", "runs/mine/report.html"]),
    ("bpgo-video train mine.yaml --ranks 2", 2, ["--run.resume auto"]),
    ("bpgo-video train mine.yaml --run.num-steps 12 --run.resume auto --ranks 2", 0, ["step 12"]),
    (
        f"bpgo-video train mine.yaml --loss.objective nft --run.dir runs/nft {TWO_STEPS}",
        0,
        ["step_weights is 'none'"],
    ),
    (
        f"bpgo-video train mine.yaml --policy.lora.rank 8 --run.dir runs/lora {TWO_STEPS}",
        0,
        ["runs/lora"],
    ),
    ("bpgo-video convert --checkpoint runs/lora --output my-lora --format lora --verify", 0, ["my-lora"]),
    ("bpgo-video train own.yaml", 2, ["brightness", "PYTHONPATH"]),
    ("PYTHONPATH=. bpgo-video train own.yaml", 0, ["runs/own"]),
    ("bpgo-video convert --checkpoint runs/mine --output my-wan --format diffusers --verify", 0, ["my-wan"]),
    ("bpgo-video generate --policy runs/mine --prompts two.txt --output made --seed 0", 0, ["made"]),
    (f"bpgo-video evaluate compare {WAN} runs/mine --output runs/compared", 0, ["runs/compared/report.html"]),
    (
        "bpgo-video evaluate layout --policy runs/mine --suite two.txt --output suite --seed 0 --samples 2",
        0,
        ["suite.generation"],
    ),
    (
        "bpgo-video evaluate score --videos suite --suite two.txt --samples 2 --output scores.json"
        " --dimensions temporal_flickering",
        0,
        ["temporal_flickering", "exact"],
    ),
    ("bpgo-video evaluate total scores.json", 2, ["missing: subject_consistency", "--partial"]),
    ("bpgo-video evaluate total scores.json --partial", 0, ["quality", "partial          True"]),
]


@pytest.fixture
def day(tmp_path: Path) -> Path:
    """The folder with the files that the user writes."""
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    (tmp_path / "two.txt").write_text("".join(f"{text}\n" for text in TEXTS[:2]))
    parquet.write_table(pyarrow.table({"prompt": TEXTS}), tmp_path / "prompts.parquet")
    for name, text in (("mine.yaml", RECIPE), ("own.yaml", OWN_RECIPE), ("brightness.py", OWN_REWARD)):
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_first_day_says_what_the_user_needs_to_know(day: Path, binaries: Path) -> None:
    problems = []
    for command, code, sentences in DAY:
        began = time.perf_counter()
        result = outside(["bash", "-c", command], day, PATH=f"{binaries}{os.pathsep}{os.environ['PATH']}")
        seconds = time.perf_counter() - began
        print(f"\n$ {command}\n{result.stdout}[exit code {result.returncode}, {seconds:.1f} s]")
        missing = [sentence for sentence in sentences if sentence not in result.stdout]
        if result.returncode != code or missing or "Traceback" in result.stdout:
            problems.append(f"$ {command}\nexit code {result.returncode}, expected {code}; missing {missing}")
    assert not problems, "\n".join(problems)
