"""The alarm for reward hacking: how often it sounds without a change, that it finds a fall, and what it remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator, default_rng
from scipy import stats

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.rules import check
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.statistics import LEVEL, fewest_prompts, too_few
from bpgo_video.training.alarm import AlarmMemory, comparisons, fall, rises, watch
from bpgo_video.training.heldout import HeldoutScores
from bpgo_video.training.response import ended, raised, respond
from bpgo_video.training.run_folder import check_same_run
from bpgo_video.training.summary import diagnose
from tests.made.recipes import small_recipe

EVALUATIONS, EVERY, PROMPTS, SAMPLES = 9, 10, 24, 2
PAIRS = EVALUATIONS * (EVALUATIONS - 1) // 2


def scores(rng: Generator, base: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """Scores of one evaluation: prompts differ more than the samples of a prompt do from one evaluation to the next."""
    return base + shift + 0.3 * rng.standard_normal((PROMPTS, SAMPLES))


def run(seed: int, falls: float = 0.0, rising: float = 0.02, corrected: bool = True) -> AlarmMemory:
    """A run of two held-out rewards, of which the second falls by so much at each evaluation after the fourth."""
    rng, memory = default_rng(seed), AlarmMemory()
    bases = {name: rng.standard_normal((PROMPTS, 1)) for name in ("steady", "falling")}
    for number in range(EVALUATIONS):
        first = max(0, number - 1) * EVERY + 1
        steps = range(first, number * EVERY + 1)
        memory.trained += [(step, rising * step + 0.1 * rng.standard_normal()) for step in steps]
        shifts = {"steady": 0.0, "falling": -falls * max(0, number - 4)}
        by_name = {name: scores(rng, base, shifts[name]) for name, base in bases.items()}
        watch(memory, number * EVERY, by_name, 2 * PAIRS if corrected else 1)
    return memory


def test_runs_without_a_change_have_a_false_alarm_in_at_most_one_of_twenty():
    runs = 160
    assert sum(bool(run(seed).alarms) for seed in range(runs)) <= (1 - LEVEL) * runs
    uncorrected = sum(bool(run(seed, corrected=False).alarms) for seed in range(40))
    assert uncorrected > 10, "the bound is due to the correction"


def test_a_fall_is_found_by_its_name_and_only_while_the_trained_reward_rises():
    found = [run(seed, falls=0.15).alarms for seed in range(20)]
    assert all(set(alarms) == {"falling"} for alarms in found)
    assert all(alarms["falling"] > 4 * EVERY for alarms in found)
    assert not any(run(seed, falls=0.15, rising=-0.02).alarms for seed in range(10))


def test_the_p_value_of_a_fall_is_the_signed_rank_tests_times_the_comparisons():
    rng = default_rng(0)
    before = rng.standard_normal((12, 2))
    now = before - 0.1 * rng.random((12, 1))
    assert fall(before, now, 7) == pytest.approx(7 * 2 / 2**12), "all twelve prompts fall"
    assert fall(now, before, 7) == 1.0
    mixed = before + np.where(np.arange(12) < 9, -0.3, 0.1)[:, None] * (1 + rng.random((12, 1)))
    expected = stats.wilcoxon((mixed - before).mean(axis=1)).pvalue
    assert fall(before, mixed, 2) == pytest.approx(2 * expected)


def test_a_rise_is_a_slope_above_zero_beyond_chance():
    rng = default_rng(1)
    noise = rng.standard_normal(40)
    assert rises([(step, 0.1 * step + noise[step]) for step in range(40)])
    assert not rises([(step, -0.1 * step + noise[step]) for step in range(40)])
    assert not rises([(step, 0.5) for step in range(40)])
    assert not rises([(1, 0.0), (2, 1.0)]), "two points have no error"


def test_the_memory_keeps_the_best_evaluation_and_the_first_alarm():
    memory = AlarmMemory(trained=[(step, float(step)) for step in range(1, 31)])
    rows = np.linspace(0, 1, 16)[:, None]
    assert not watch(memory, 0, {"a": rows}, 1)
    assert not watch(memory, 10, {"a": rows + 0.5}, 1)
    (alarm,) = watch(memory, 20, {"a": rows}, 1)
    assert (alarm.since, alarm.before, alarm.now) == (10, pytest.approx(1.0), pytest.approx(0.5))
    assert memory.best["a"]["step"] == 10
    assert not watch(memory, 30, {"a": rows - 1}, 1), "once per reward"
    assert memory.alarms == {"a": 20}


def test_with_a_raised_kl_a_further_fall_sounds_again():
    memory = AlarmMemory(trained=[(step, float(step)) for step in range(1, 41)])
    rows = np.linspace(0, 1, 16)[:, None]
    sounds = [len(watch(memory, 10 * i, {"a": rows - shift}, 1, again=True)) for i, shift in enumerate((0, 1, 1, 2))]
    assert sounds == [0, 1, 0, 1]
    assert memory.alarms == {"a": 10}


def test_comparisons_count_all_pairs_of_evaluations_and_rewards(tmp_path: Path):
    recipe = small_recipe(tmp_path / "run", tmp_path / "shards", run={"num_steps": 100}, evaluation={"every": 25})
    rewards = len(recipe.evaluation.rewards)
    assert comparisons(recipe) == 5 * 4 // 2 * rewards
    assert comparisons(with_(recipe, "run", num_steps=101)) == 6 * 5 // 2 * rewards, "the last step is evaluated too"
    assert comparisons(with_(recipe, "evaluation", every=0)) == rewards
    assert too_few(fewest_prompts(10) - 1, 10)
    assert not too_few(fewest_prompts(10), 10)


def with_(config: Config, name: str, **changes: Any) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **changes)})


def after_a_fall(tmp_path: Path, kind: str) -> tuple[Config, AlarmMemory, list[str]]:
    """A recipe of this alarm, the memory after a fall, and what the run says."""
    config = small_recipe(tmp_path, tmp_path, loss={"kl_weight": 0.5}, evaluation={"alarm": kind, "every": 1})
    memory, mesh = AlarmMemory(trained=[(step, float(step)) for step in range(1, 11)]), Mesh(0, 1, torch.device("cpu"))
    rows = torch.linspace(0, 1, 40)[:, None]
    assert not respond(config, memory, 0, HeldoutScores({"oracle": rows}), mesh)
    return config, memory, respond(config, memory, 10, HeldoutScores({"oracle": rows - 1}), mesh)


def test_a_run_does_what_the_recipe_says_about_an_alarm(tmp_path: Path):
    config, memory, (said,) = after_a_fall(tmp_path, "warn")
    assert "held-out oracle fell from 0.5 to -0.5 since step 0" in said
    assert ended(config, memory) == ""
    assert raised(config, memory) == config

    config, memory, (said,) = after_a_fall(tmp_path, "stop")
    assert "the run ends here" in said
    assert "after step 10 of 1," in ended(config, memory)
    assert raised(config, memory) == config

    config, memory, (said,) = after_a_fall(tmp_path, "kl")
    assert "loss.kl_weight is 2 from here on" in said
    assert ended(config, memory) == ""
    assert raised(config, memory).loss.kl_weight == 4.0 * 0.5

    config, memory, said_nothing = after_a_fall(tmp_path, "none")
    assert (said_nothing, memory.alarms, memory.best) == ([], {}, {})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluation": {"alarm": "stop", "every": 0}}, "set evaluation.every"),
        ({"evaluation": {"alarm": "kl", "every": 5}}, "loss.kl_weight = 0"),
    ],
)
def test_an_alarm_that_cannot_act_is_refused(tmp_path: Path, sections: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        check(small_recipe(tmp_path, tmp_path, **sections))


def test_a_run_may_resume_with_another_alarm_unless_that_changes_its_numbers(tmp_path: Path):
    stopping = small_recipe(tmp_path, tmp_path, evaluation={"alarm": "stop", "every": 5}, loss={"kl_weight": 0.1})
    check_same_run(stopping, with_(stopping, "evaluation", alarm="warn"))
    with pytest.raises(ConfigError, match="evaluation"):
        check_same_run(stopping, with_(stopping, "evaluation", alarm="kl"))


def test_the_diagnosis_names_alarms_the_end_and_a_test_that_cannot_show_anything():
    summary = {"alarms": {"oracle": 50}, "ended": "The run ended after step 50.", "alarm_comparisons": 20}
    found = diagnose([{"step": 0, "reward": 0.5}], {**summary, "heldout_prompts": 64})
    assert [sentence.split(":")[0] for sentence in found] == ["The run ended after step 50.", "Reward hacking"]
    assert "after step 50 held-out oracle" in found[1]
    (sentence,) = diagnose([{"step": 0, "reward": 0.5}], {"alarm_comparisons": 20, "heldout_prompts": 4})
    assert "could not sound: 4 held-out prompts are too few for 20" in sentence
    assert f"Hold out {fewest_prompts(20)} or more" in sentence
