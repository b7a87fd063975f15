"""Tables printed by the benchmarks, and the measurement of waiting time."""

from __future__ import annotations

import pytest
import torch

from tools.bench.rewards import as_markdown as rewards_table
from tools.bench.rewards import measure as measure_rewards
from tools.bench.table import as_markdown
from tools.bench.timing import waiting


def test_waiting_time_is_zero_without_collectives() -> None:
    with waiting() as found:
        torch.ones(3).sum()
    assert found.seconds == 0


def test_the_table_shows_every_value() -> None:
    times = {"seconds": 4.0, "seconds/rollout": 1.5, "seconds/reward": 0.25, "seconds/update": 2.0}
    found = {
        "machine": {"date": "2026-01-02", "processor": "P", "cores": 2},
        "zero3_gathered_over_zero0": 1.01, "zero3_sharded_over_zero0": 1.3, "zero3_memory_over_zero0": 0.5,
        "learner_over_step": 0.004,
        "overlap": {"chunks": 8, "bound": 1.181, "inline": {"over_longer": 1.96}, "beside": {"over_longer": 1.14}},
        "against_diffusers": {"guidance_scale 1.0": {"ratio": 0.97}},
        "decoding_over_diffusers": 0.432,
        "phases": {"replay": 0.5, "communication": 0.125, "optimizer": 0.01},
        "updates": {"over_plain": {"zero3, sharded": 1.375}},
        "scaling": [{"ranks": 2, "frames": 17, **times}],
    }  # fmt: skip
    table = as_markdown(found)
    for figure in (
        "1.010",
        "1.300",
        "0.500",
        "0.970",
        "0.432",
        "0.125",
        "0.004",
        "| zero3, sharded | 1.375 |",
        "1.960",
        "1.140",
        "8 chunks",
        "| frames 17 | 2 | 4.00 | 1.50 | 0.25 | 2.00 |",
    ):
        assert figure in table


def test_rewards_are_timed_on_real_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.bench.rewards.FRAMES", 3)
    found = measure_rewards(["temporal_flickering"])
    assert all(time > 0 for time in found["temporal_flickering"])
    assert "| `temporal_flickering` | 1.5 | 2.0 |" in rewards_table({"temporal_flickering": [1.5, 2.0]})
