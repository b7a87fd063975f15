"""Evaluation on held-out prompts: it leaves no trace in random generators, and other eyes see every video once."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bpgo_video.config import Config, ConfigError, EmaConfig, EvaluationConfig
from bpgo_video.config_rules import check
from bpgo_video.data.video import read_video
from bpgo_video.heldout import HeldoutScores, write_shown
from bpgo_video.randomness import isolated
from bpgo_video.types import RolloutChunk


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_draws_inside_leave_no_trace_behind() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with isolated():
        inside = draws()
        torch.manual_seed(7)
    assert inside == expected, "the block goes on where the generators are"
    assert draws() == expected
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), isolated():
        _ = torch.rand(()) / 0 + 1 // 0
    assert torch.equal(torch.get_rng_state(), state), "also where the block raises"


def test_both_weights_are_measured_and_the_raw_ones_decide(recipe: Config) -> None:
    assert [EvaluationConfig(weights=kind).measured for kind in ("raw", "ema", "both")] == [
        ("raw",),
        ("ema",),
        ("raw", "ema"),
    ]
    both = replace(recipe, evaluation=replace(recipe.evaluation, weights="both"))
    with pytest.raises(ConfigError, match=r"evaluation\.weights is 'both' with ema\.decay = 0"):
        check(both)
    check(replace(both, ema=EmaConfig(decay=0.99)))
    scores = HeldoutScores({"oracle": torch.tensor([[0.0, 1.0]])})
    assert scores.metrics("heldout_ema").keys() == {"heldout_ema/oracle", "heldout_ema/oracle_stderr"}


def test_the_first_samples_of_evenly_spread_prompts_are_written(recipe: Config, tmp_path: Path) -> None:
    """Five prompts of two samples, three shown: prompts 0, 2 and 4, whatever the order and repetition of chunks."""
    config = replace(recipe, evaluation=replace(recipe.evaluation, samples_per_prompt=2, videos=3))
    rows, samples = torch.tensor([4, 4, 0, 0, 2, 1, 3]), torch.tensor([0, 1, 0, 0, 0, 0, 1])
    grey = (rows / 8 + samples / 16)[:, None, None, None, None].expand(-1, 5, 3, 16, 16)
    seen = write_shown(tmp_path, 5, config)
    for start in (0, 3):
        part = slice(start, start + 4)
        seen(RolloutChunk((), grey[part], rows[part], samples[part]))
    shades = [float(read_video(path)[0].mean()) for path in sorted(tmp_path.glob("*.mp4"))]
    assert shades == pytest.approx([0.0, 0.25, 0.5], abs=0.02)
