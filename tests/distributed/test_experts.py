"""A policy of two transformers on two ranks: updates equal those of torch's optimizer and change only the used ones.

Also whole runs: resumed, with a single trained expert, and refused where ranks would deadlock.
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
GATHERED = ("zero3-micro_batch", "zero3-update", "zero3_offload-micro_batch", "zero3_offload-update")
BF16 = ("zero3_bf16", "zero3_bf16-update")
BOTH, HIGH, LOW = ["transformer", "transformer_2"], ["transformer"], ["transformer_2"]


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """Each rank's results by DeepSpeed configuration."""
    output = tmp_path_factory.mktemp("experts")
    CASES["wan22"].write(output / "pipeline")
    run_ranks(2, [str(output / "pipeline"), str(output), *CONFIGS, *GATHERED, *BF16], worker="experts_worker")
    return [json.loads(path.read_text()) for path in sorted(output.glob("rank*.json"))]


@pytest.mark.parametrize("config", [*CONFIGS, *GATHERED])
def test_updates_of_one_transformer_equal_those_of_torch(updates: list[dict[str, dict]], config: str) -> None:
    for found in updates:
        assert max(found[config]["errors"]) < 1e-5
        assert max(map(abs, found[config]["norms"])) < 1e-4


@pytest.mark.parametrize("config", [*CONFIGS, *GATHERED, *BF16])
def test_the_unused_transformer_is_bit_identical(updates: list[dict[str, dict]], config: str) -> None:
    assert all(found[config]["moved"] == [BOTH, HIGH, BOTH, LOW, BOTH] for found in updates)


@pytest.mark.parametrize("config", ["zero3", "zero3_offload"])
def test_gathered_weights_give_the_same_bits(updates: list[dict[str, dict]], config: str) -> None:
    for found in updates:
        assert found[f"{config}-micro_batch"] == found[config]


@pytest.mark.parametrize("config", ["zero3", "zero3_bf16"])
def test_memory_of_a_gathered_rollout_counts_both_transformers(updates: list[dict[str, dict]], config: str) -> None:
    for found in updates:
        assert 0.49 < found[config]["missing"] < 0.51  # half of all weights, which the other rank has


@pytest.mark.parametrize("config", [*CONFIGS, *GATHERED])
def test_an_engine_resumes_from_a_checkpoint_bit_for_bit(updates: list[dict[str, dict]], config: str) -> None:
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
def test_a_run_resumes_from_before_the_first_update_of_the_second_expert(runs: Path, stage: str, lora: str) -> None:
    assert_same_run(runs / f"{stage}-{lora}-whole", runs / f"{stage}-{lora}-stopped")
    records = read_metrics(runs / f"{stage}-{lora}-whole" / "metrics.jsonl")
    assert [record["ratio_error_first_update_max"] for record in records] == [0.0] * 4


def test_only_the_trained_expert_changes_if_ranks_train_different_steps(runs: Path) -> None:
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
    assert steps <= {"02", "03", "04"}, "steps of low noise except the last"


def test_per_prompt_steps_of_both_experts_are_refused_on_every_rank(runs: Path) -> None:
    with pytest.raises(AssertionError, match=r"share_steps is 'group', so that ranks would train different ones"):
        run_ranks(2, [str(runs / "shards"), str(runs), "both=one_expert:both:zero3"], timeout=200)
