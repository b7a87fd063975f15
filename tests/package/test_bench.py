"""The GPU bench on a small shape, and the tables that the benches print."""

from __future__ import annotations

import pytest
import torch

from tools.bench.gpu import WAN_1_3B, Shape, forward_operations, measure, random_policy
from tools.bench.rewards import as_markdown as rewards_table
from tools.bench.rewards import measure as measure_rewards
from tools.bench.table import as_markdown
from tools.bench.timing import waiting

SMALL = {**WAN_1_3B, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 8,
         "in_channels": 4, "out_channels": 4, "freq_dim": 16}  # fmt: skip
SHAPE = Shape(SMALL, (4, 3, 8, 8), torch.device("cpu"), torch.float32)


def test_operations_are_those_of_the_matrix_products() -> None:
    tokens, text, dim, ffn = 3 * 4 * 4, 512, 32, 64
    self_attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    cross_attention = 2 * tokens * dim * dim + 2 * text * dim * dim + 2 * tokens * text * dim
    blocks = 2 * (self_attention + cross_attention + 2 * tokens * dim * ffn)
    patches = 2 * tokens * dim * 4 * 4  # in and out, 2x2 patches of 4 channels
    embeddings = text * (8 * dim + dim * dim) + 16 * dim + dim * dim + dim * 6 * dim
    assert forward_operations(random_policy(SHAPE), SHAPE) == 2 * (blocks + patches + embeddings)


def test_a_small_shape_is_measured_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.bench.gpu.MATRIX", 64)
    found = measure(SHAPE)
    assert found["replay_seconds"] > found["rollout_seconds"] > 0
    assert found["rollout_mfu"] == pytest.approx(
        found["forward_operations"] / found["rollout_seconds"] / found["matrix_rate"]
    )


def test_waiting_counts_nothing_where_nobody_waits() -> None:
    with waiting() as found:
        torch.ones(3).sum()
    assert found.seconds == 0


def test_the_table_shows_every_figure() -> None:
    times = {"seconds": 4.0, "seconds/rollout": 1.5, "seconds/reward": 0.25, "seconds/update": 2.0}
    found = {
        "machine": {"date": "2026-01-02", "processor": "P", "cores": 2},
        "zero3_gathered_over_zero0": 1.01, "zero3_sharded_over_zero0": 1.3, "zero3_memory_over_zero0": 0.5,
        "learner_over_step": 0.004,
        "overlap": {"chunks": 8, "bound": 1.181, "inline": {"over_longer": 1.96}, "beside": {"over_longer": 1.14}},
        "against_diffusers": {"guidance_scale 1.0": {"ratio": 0.97}},
        "phases": {"replay": 0.5, "communication": 0.125, "optimiser": 0.01},
        "scaling": [{"ranks": 2, "frames": 17, **times}],
    }  # fmt: skip
    table = as_markdown(found)
    for figure in (
        "1.010",
        "1.300",
        "0.500",
        "0.970",
        "0.125",
        "0.004",
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
