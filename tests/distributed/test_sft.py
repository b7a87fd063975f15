"""Supervised fine-tuning on real ranks: plain gradients, the same steps on any ranks, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bpgo_video.data.reader import PromptShards
from bpgo_video.data.stream import EndlessOrder
from bpgo_video.inference.conversion import Conversion, convert
from bpgo_video.inference.run_weights import find_checkpoint
from bpgo_video.policies import load_policy
from bpgo_video.training.sft import ClipReader, clip_loss
from tests.distributed.conftest import run_ranks
from tests.distributed.sameness import assert_same_run, records
from tests.distributed.sft_worker import HUGE_STEP, case
from tests.distributed.test_training import exported, starting_weights
from tests.made.clip_folders import make_clips

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TWO_RANKS = (
    "gradient=zero3:gradient:1",
    "whole=zero3:full:4",
    *("stopped=zero3:full:2", "stopped=zero3:full:4:auto"),
    "lora-whole=zero2:lora:4",
    *("lora-stopped=zero2:lora:2", "lora-stopped=zero2:lora:4:auto"),
    "sequence=zero3:full:4:never:2",
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips") / "shards")


@pytest.fixture(scope="module")
def runs(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    run_ranks(1, [str(clips), str(folder), "alone=zero1:full:4"], worker="sft_worker")
    run_ranks(2, [str(clips), str(folder), *TWO_RANKS], worker="sft_worker")
    return folder


def test_the_gradient_of_a_step_equals_that_of_the_whole_batch(runs: Path, clips: Path) -> None:
    """The reference is plain autograd in one process over the first eight clips."""
    config = case(clips, runs / "plain", "zero3", "gradient", "1")
    policy = load_policy(config.policy.folder, max_sequence_length=16, components=("transformer",))
    shards = PromptShards(clips)
    order = EndlessOrder(shards, "train", config.run.seed, 8)
    rows = [order.row(place) for place in range(8)]
    assert len(set(rows)) == 8
    batch = ClipReader(shards, order, shards.rows("heldout"), torch.float32, torch.device("cpu")).read(rows)
    loss = clip_loss(config, policy, shards, torch.float32, torch.device("cpu"))
    loss.errors(batch, 0, "transformer").mean().backward()
    start, found = starting_weights(), exported(runs / "gradient")
    for name, parameter in policy.transformers["transformer"].named_parameters():
        gradient = (start[name] - found[name]) / HUGE_STEP
        assert parameter.grad is not None
        assert parameter.grad.norm() > 0, name
        assert (gradient - parameter.grad).norm() / parameter.grad.norm() < 1e-4, name


@pytest.mark.parametrize("name", ["whole", "sequence"])
def test_two_ranks_under_zero_3_take_the_same_steps_as_one(runs: Path, name: str) -> None:
    one, two = records(runs / "alone"), records(runs / name)
    assert [list(record) for record in one] == [list(record) for record in two]
    for expected, found in zip(one, two, strict=True):
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (expected["step"], key)
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    for folder in ("export", "export-ema"):
        first, second = exported(runs / "alone", folder), exported(runs / name, folder)
        assert all((first[key] - second[key]).norm() / first[key].norm() < 1e-4 for key in first), folder


@pytest.mark.parametrize("name", ["", "lora-"])
def test_two_plus_two_steps_equal_four_steps(runs: Path, name: str) -> None:
    whole, stopped = runs / f"{name}whole", runs / f"{name}stopped"
    assert len(records(whole)) == 4
    logged = [[record for record in records(run) if record["step"] > 1] for run in (whole, stopped)]
    assert logged[0] == logged[1]
    assert_same_run(whole, stopped)
    start = starting_weights()
    for folder in ("export", "export-ema"):
        first, second = exported(whole, folder), exported(stopped, folder)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert any(not torch.equal(first[key], start[key]) for key in start), "the run must have trained something"


def test_the_summary_describes_the_training_data(runs: Path) -> None:
    summary = json.loads((runs / "whole" / "summary.json").read_text())
    assert (summary["algorithm"], summary["clips"], summary["epochs"], summary["heldout_clips"]) == ("sft", 32, 1.6, 5)
    last = records(runs / "whole")[-1]
    assert summary["heldout_loss_after"] == pytest.approx(last["heldout/loss"])
    levels = [value for key, value in last.items() if key.startswith("heldout/loss_at_")]
    assert last["heldout/loss"] == pytest.approx(sum(levels) / 2)


@pytest.mark.parametrize(("name", "form"), [("whole", "diffusers"), ("lora-whole", "lora")])
def test_checkpoints_convert_and_include_a_model_card(runs: Path, name: str, form: str, tmp_path: Path) -> None:
    convert(Conversion(find_checkpoint(runs / name), "ema", tmp_path / "out"), form, verify=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "flow matching; noise levels logit_normal" in card
    assert "4 of 4, seed 0; 8 clips a step" in card
    if form == "diffusers":
        written = load_file(next((tmp_path / "out" / "transformer").glob("*.safetensors")))
        assert all(torch.equal(value, exported(runs / name, "export-ema")[key]) for key, value in written.items())
