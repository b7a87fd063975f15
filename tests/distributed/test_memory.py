"""The memory plan against the allocations of two DeepSpeed ranks, phase by phase."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bpgo_video.config.policy import LoraConfig
from bpgo_video.config.reading import read_yaml
from bpgo_video.planning.footprint import footprint
from bpgo_video.planning.zero import Zero, on_gpu, zero_at_rest, zero_at_work
from tests.distributed.conftest import run_ranks
from tests.distributed.memory_worker import CASES, POLICY, SAMPLES, VIDEO, zero
from tests.made.recipes import RECIPE

pytestmark = pytest.mark.slow
BOUND = 0.15
RANKS = 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("memory")
    run_ranks(RANKS, [str(folder)], worker="memory_worker")
    return json.loads(Path(folder / "rank0.json").read_text())


def planned(stage: int, lora_rank: int, checkpointing: bool) -> dict[str, int]:
    config, settings = read_yaml(RECIPE), Zero.of(zero(stage), RANKS)
    work = footprint(POLICY, VIDEO, SAMPLES, torch.float32, checkpointed=checkpointing, lora=LoraConfig(rank=lora_rank))
    resting = zero_at_rest(settings, work.weights, config)
    parts = [*resting, *zero_at_work(settings, work.weights, config, keeps=1 - checkpointing)]
    total = {phase: sum(on_gpu(parts, phase).values()) for phase in ("denoise", "replay", "update")}
    return {
        "rest": sum(on_gpu(resting, "update").values()),
        "denoise": total["denoise"] + work.forward.peak,
        "replay": total["replay"] + work.replay.peak,
        "update": total["update"],
    }


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_within_15_percent_of_what_deepspeed_allocates(
    measured: dict[str, dict[str, int]], case: str
) -> None:
    plan = planned(*CASES[case])
    ratios = {phase: round(plan[phase] / size, 3) for phase, size in measured[case].items()}
    assert all(1 - BOUND < ratio < 1 + BOUND for ratio in ratios.values()), ratios
