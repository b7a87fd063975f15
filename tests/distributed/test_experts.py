"""A policy of two transformers on two ranks: an update moves those that it touched, as torch's own optimiser would.

And runs of it: stopped and gone on with, one trained and one not, and what would leave ranks waiting for each other.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bpgo_video.training.metrics import read_metrics
from tests.distributed.conftest import run_ranks
from tests.distributed.sameness import assert_same_run
from tests.families import CASES
from tests.made.recipes import make_shards

pytestmark = pytest.mark.slow

CONFIGS = ("zero1", "zero2", "zero3", "zero3_offload")
BOTH, HIGH, LOW = ["transformer", "transformer_2"], ["transformer"], ["transformer_2"]


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What each rank found, by DeepSpeed configuration."""
    output = tmp_path_factory.mktemp("experts")
    CASES["wan22"].write(output / "pipeline")
    run_ranks(2, [str(output / "pipeline"), str(output), *CONFIGS, "zero3_bf16"], worker="experts_worker")
    return [json.loads(path.read_text()) for path in sorted(output.glob("rank*.json"))]


@pytest.mark.parametrize("config", CONFIGS)
def test_updates_that_touch_one_leave_the_other(updates: list[dict[str, dict]], config: str) -> None:
    for found in updates:
        assert max(found[config]["errors"]) < 1e-5
        assert max(map(abs, found[config]["norms"])) < 1e-4


@pytest.mark.parametrize("config", [*CONFIGS, "zero3_bf16"])
def test_no_bit_of_the_other_changes(updates: list[dict[str, dict]], config: str) -> None:
    assert all(found[config]["moved"] == [BOTH, HIGH, BOTH, LOW, BOTH] for found in updates)


@pytest.mark.parametrize("config", ["zero3", "zero3_bf16"])
def test_what_a_gathered_rollout_takes_counts_both(updates: list[dict[str, dict]], config: str) -> None:
    for found in updates:
        assert 0.49 < found[config]["missing"] < 0.51  # half of all weights: the other rank has them


@pytest.mark.parametrize("config", CONFIGS)
def test_an_engine_goes_on_from_a_checkpoint_to_the_bit(updates: list[dict[str, dict]], config: str) -> None:
    assert all(found[config]["resumed"] for found in updates)


RUNS = (("zero2", "full"), ("zero3", "full"), ("zero3", "lora"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the pipeline, its shards, and runs on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    CASES["wan22"].write(folder / "pipeline")
    cases = ["low=one_expert:transformer_2:zero3"]
    for stage, lora in RUNS:
        cases += [f"{stage}-{lora}-whole=experts:{stage}:{lora}:4"]
        cases += [f"{stage}-{lora}-stopped=experts:{stage}:{lora}:{steps}" for steps in ("2", "4:auto")]
    run_ranks(2, [str(make_shards(folder / "shards", folder / "pipeline")), str(folder), *cases])
    return folder


@pytest.mark.parametrize(("stage", "lora"), RUNS)
def test_a_run_goes_on_from_before_the_second_experts_first_update(runs: Path, stage: str, lora: str) -> None:
    assert_same_run(runs / f"{stage}-{lora}-whole", runs / f"{stage}-{lora}-stopped")
    records = read_metrics(runs / f"{stage}-{lora}-whole" / "metrics.jsonl")
    assert [record["ratio_error_first_update_max"] for record in records] == [0.0] * 4


def test_the_trained_expert_alone_changes_where_ranks_train_different_steps(runs: Path) -> None:
    for name, same in (("transformer", True), ("transformer_2", False)):
        before, after = (
            load_file(folder / name / "diffusion_pytorch_model.safetensors")
            for folder in (runs / "pipeline", runs / "low" / "export")
        )
        assert all(torch.equal(before[key], after[key]) for key in before) == same
    steps = {
        key.split("/")[1]
        for record in read_metrics(runs / "low" / "metrics.jsonl")
        for key in record
        if key.startswith("timestep/")
    }
    assert steps <= {"02", "03", "04"}, "the steps of low noise, without the last"


def test_steps_of_both_for_each_prompt_are_refused_on_every_rank(runs: Path) -> None:
    with pytest.raises(AssertionError, match=r"share_steps is 'group', by which ranks would train steps"):
        run_ranks(2, [str(runs / "shards"), str(runs), "both=one_expert:both:zero3"], timeout=200)
