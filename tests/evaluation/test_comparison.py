"""Conclusions of a comparison: verdicts, notes, matching by training reward, and refused pairings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpgo_video import statistics
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.reading import to_yaml
from bpgo_video.data.media import read_video
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.documents import MalformedFile
from bpgo_video.evaluation.compare import VideoStats, diversity, labelled, motion, recipe_of, thumbnails
from bpgo_video.evaluation.compare_report import as_table
from bpgo_video.evaluation.comparison import (
    TRAINING_REWARD,
    Comparison,
    ModelScores,
    PairingError,
    compare,
    has_scores,
    match_reward,
    read_parts,
    read_scores,
    video_path,
    write_comparison,
    write_scores,
)
from bpgo_video.statistics import can_show
from bpgo_video.training.heldout import heldout_test
from bpgo_video.types import RolloutChunk
from tests.made.synthetic_results import MEASURES, results


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 499)


def comparisons(*models: ModelScores) -> Sequence[Comparison]:
    return compare(models).comparisons


def pitfalls(one: Comparison) -> list[str]:
    """The notes without the one about the detectable difference."""
    return [note for note in one.notes if "power" not in note]


def with_rewards(label: str, step: int, reward: float, oracle: Sequence[float]) -> ModelScores:
    """Two prompts of one sample with this training reward and these held-out scores."""
    values = {"alignment": reward, "smooth": 0.0}
    lines = [
        replace(line, scores={name: [values.get(name, held)] for name in MEASURES})
        for line, held in zip(results(label, 2).prompts, oracle, strict=True)
    ]
    return replace(results(label, 2), prompts=lines, step=step)


@pytest.mark.parametrize(
    ("gains", "outcome", "words"),
    [
        ({"oracle": 1.0}, "better", "B is better than A: held-out oracle +1."),
        ({"oracle": -1.0}, "worse", "B is worse than A: held-out oracle -1."),
        ({"oracle": 1.0, "second": -1.0}, "mixed", "B is better than A in some held-out measures and worse in others"),
        ({"pixel_motion": 1.0}, "no difference shown", "No difference shown between A and B: held-out oracle"),
    ],
)
def test_the_verdict_follows_from_the_held_out_measures(gains: dict[str, float], outcome: str, words: str) -> None:
    (one,) = comparisons(results("A"), results("B", gains=gains))
    assert one.outcome == outcome
    assert one.verdict.startswith(words)


@pytest.mark.parametrize(("prompts", "gain"), [(6, 9.0), (12, 0.0), (12, 0.3), (12, -9.0)])
def test_a_run_and_a_comparison_say_the_same_about_the_same_scores(recipe: Config, prompts: int, gain: float) -> None:
    """The run measures its held-out reward alone, and the comparison all seven measures."""
    rewards = [{name: next(iter(recipe.rewards.values())) for name in names}
               for names in (("alignment", "smooth"), ("oracle", "second"))]  # fmt: skip
    config = replace(recipe, rewards=rewards[0], evaluation=replace(recipe.evaluation, rewards=rewards[1]))
    before, after = results("A", prompts), results("B", prompts, gains={"oracle": gain}, spread=0.5)
    first, last = (torch.from_numpy(model.table("oracle")) for model in (before, after))
    compared = comparisons(before, after)[0].effects["oracle"]
    assert heldout_test(first, last, config) == {
        "heldout_interval": [compared.low, compared.high],
        "heldout_p_value": compared.p_adjusted,
        "heldout_measures": 7,
        "heldout_shown": compared.shown,
        "heldout_detectable": compared.detectable,
    }
    assert compared.shown == {9.0: 0, 0.0: 0, 0.3: 0, -9.0: -1}[gain]


def test_the_same_scores_show_no_difference() -> None:
    (one,) = comparisons(results("A"), replace(results("A"), label="B"))
    assert one.outcome == "no difference shown"
    assert all(effect.ties == effect.prompts and effect.p_adjusted == 1.0 for effect in one.effects.values())
    assert one.notes == []


@pytest.mark.parametrize(
    ("prompts", "changes", "words"),
    [
        (12, {"gains": {"alignment": 1.0}}, "no held-out score is shown to have risen: the candidate may exploit its"),
        (
            12,
            {"gains": {"alignment": 1.0, "oracle": -1.0}},
            "held-out scores fell: the candidate may exploit its training",
        ),
        (12, {"gains": {"pixel_motion": -1.0}}, "Videos move less: pixel_motion fell by"),
        (12, {"gains": {"pixel_diversity": -1.0}}, "Samples of one prompt are more alike: pixel_diversity fell by"),
        (4, {"gains": {"oracle": 9.0}}, "4 prompts are too few to show any difference among 7 measures"),
        (12, {"seed": 1}, "different seeds"),
    ],
)
def test_notes_name_possible_pitfalls(prompts: int, changes: dict[str, Any], words: str) -> None:
    (one,) = comparisons(results("A", prompts), results("B", prompts, **changes))
    (note,) = pitfalls(one)
    assert words in note


def test_a_note_says_which_difference_so_many_prompts_can_show() -> None:
    (one,) = comparisons(results("A"), results("B", spread=0.5))
    (note,) = one.notes
    words = can_show(12, 7, one.effects["oracle"].detectable)
    assert note == f"{words} (oracle): use more prompts to show a smaller one."


def test_a_note_about_all_candidates_is_given_once_and_others_name_theirs() -> None:
    models = [results("A", 4), *(results(label, 4, gains={"oracle": 9.0}) for label in "BC"), results("D", 4, seed=1)]
    notes = compare(models).notes
    assert [note for note in notes if "too few to show any difference among 21 measures" in note] == notes[:1]
    assert [note.partition(":")[0] for note in notes if "different seeds" in note] == ["D"]


def test_a_note_names_tags_that_disagree() -> None:
    lines = [
        replace(line, scores={**line.scores, "oracle": [score + line.id % 2 for score in line.scores["oracle"]]})
        for line in results("B").prompts
    ]
    (one,) = comparisons(results("A"), replace(results("B"), prompts=lines))
    (note,) = pitfalls(one)
    assert "oracle changed by +1.0" in note
    assert "on 'clear' prompts" in note


def test_the_correction_covers_every_measure_of_every_model() -> None:
    """7 and 14 tests: if all 12 prompts agree, p is 2 / 2^12, and its adjusted value 7 or 14 times that."""
    gained = {"oracle": 1.0}
    (one,) = comparisons(results("A"), results("B", gains=gained))
    first, second = comparisons(results("A"), results("B", gains=gained), results("C"))
    p = one.effects["oracle"].p_value
    assert p == pytest.approx(2 / 2**12)
    assert one.effects["oracle"].p_adjusted == pytest.approx(7 * p)
    assert first.effects["oracle"].p_adjusted == pytest.approx(14 * p)
    assert second.effects["oracle"].p_adjusted == 1.0


def test_the_training_reward_is_the_weighted_sum() -> None:
    (one,) = comparisons(results("A"), results("B", gains={"alignment": 1.0, "smooth": 2.0}))
    parts = one.effects["alignment"].difference + 0.5 * one.effects["smooth"].difference
    assert one.effects[TRAINING_REWARD].difference == pytest.approx(parts)


def test_a_match_is_the_first_step_at_which_the_curve_crosses_the_reward() -> None:
    """From .0 to .4 over steps 0 to 10, then to .2 at 20: .3 is first at 7.5, three quarters of the way."""
    points = ((0, 0.0, (0.0, 2.0)), (10, 0.4, (1.0, 4.0)), (20, 0.2, (9.0, 9.0)))
    curve = [with_rewards("X", step, reward, oracle) for step, reward, oracle in points]
    match = match_reward(curve, with_rewards("Y", 0, 0.3, (1.0, 3.0)))
    assert match is not None
    assert (match.step, match.reward) == (pytest.approx(7.5), pytest.approx(0.3))
    assert match.effects["oracle"].mean_a == pytest.approx((0.75 + 3.5) / 2)
    assert match.effects["oracle"].difference == pytest.approx(2.0 - 2.125)
    assert match_reward(curve, with_rewards("Y", 0, 0.5, (1.0, 3.0))) is None


def test_the_curve_of_a_run_begins_with_its_starting_policy() -> None:
    """Run X has Y's training reward between its start and step 100, and there Y has the higher oracle score."""
    base = results("base")
    other = results("Y", gains={"alignment": 1.0, "oracle": 2.0}, run="runs/Y", step=10)
    models = [base, results("X", gains={"alignment": 2.0, "oracle": 2.0}, run="runs/X", step=100), other]
    found = compare(models)
    first, second = found.matchings
    assert (first.run, first.other, second.run, second.other) == ("X", "Y", "Y", "X")
    assert first.match is not None
    assert first.match.step == pytest.approx(50, abs=3)
    assert first.match.effects["oracle"].difference == pytest.approx(1.0, abs=0.1)
    assert second.match is None
    table = as_table(found)
    assert "which X has at step 5" in table or "which X has at step 4" in table
    assert "Y never has the training reward of X between its checkpoints here" in table
    assert compare(models[:2]).matchings == []


def test_comparison_json_holds_verdict_effects_and_models(tmp_path: Path) -> None:
    second = replace(results("B", gains={"oracle": 1.0}), folder=tmp_path / "b")
    found = compare([results("A"), second])
    content = json.loads(write_comparison(tmp_path, found).read_text())
    (one,) = content["comparisons"]
    assert one.keys() == {
        "reference", "candidate", "outcome", "verdict", "notes", "same_noise", "effects", "by_tag", "tests",
    }  # fmt: skip
    assert (one["outcome"], one["reference"], one["candidate"]) == ("better", "A", "B")
    assert one["effects"]["oracle"]["shown"] == 1
    assert one["effects"].keys() == {*MEASURES, TRAINING_REWARD}
    assert one["by_tag"].keys() == {"clear", "open"}
    assert one["by_tag"]["open"]["oracle"]["p_adjusted"] is None
    assert content["models"][1] == {
        "label": "B", "source": "models/B", "results": str(tmp_path / "b"), "run": None, "step": None, "seed": 0,
        "samples_per_prompt": 3, "means": {name: float(second.table(name).mean()) for name in one["effects"]},
    }  # fmt: skip


def test_scores_with_different_prompts_rewards_or_settings_are_not_paired() -> None:
    first, other = results("A"), results("B")
    fewer = {name: MEASURES[name] for name in list(MEASURES)[1:]}
    steps = {**other.settings, "deployment": {**other.settings["deployment"], "num_steps": 4}}
    for different, words in (
        (results("B", prompts=11), "scores of different prompts"),
        (replace(other, measures=fewer), "measured by different rewards"),
        (replace(other, settings=steps), "num_steps 8 and 4"),
    ):
        with pytest.raises(PairingError, match=words):
            comparisons(first, different)


def test_scores_are_read_back_unchanged_or_refused_by_name(tmp_path: Path) -> None:
    written = replace(results("A", run="runs/X", step=3), folder=tmp_path)
    assert not has_scores(tmp_path)
    write_scores(written)
    assert has_scores(tmp_path)
    assert read_scores(tmp_path) == written
    assert read_scores(tmp_path, label="B") == replace(written, label="B")
    content = json.loads((tmp_path / "scores.json").read_text())
    assert "folder" not in content
    content["prompts"][0]["scores"]["oracle"].pop()
    (tmp_path / "scores.json").write_text(json.dumps(content))
    with pytest.raises(MalformedFile, match=r"scores\.json: every prompt needs as many scores"):
        read_scores(tmp_path)
    for path, text in (("scores.json", "{}"), ("parts/00000.json", '[{"id": 1}]')):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
        with pytest.raises(MalformedFile, match=rf"{path}: .*delete it"):
            read_scores(tmp_path) if path == "scores.json" else read_parts(tmp_path)


def test_labels_of_models_are_distinct() -> None:
    arguments = ["package:bpgo_video.tiny/weights/wan", "runs/a/checkpoints/step-000050", "runs/a/export", "runs/a",
                 "runs/a/", "mine=runs/b=c", "./x=y/z"]  # fmt: skip
    labels = ["wan", "a step-000050", "a/export", "a", "a (2)", "mine", "z"]
    assert [one.label for one in labelled(arguments)] == labels
    assert [one.source for one in labelled(arguments)][-2:] == ["runs/b=c", "./x=y/z"]


def test_the_recipe_of_a_run_is_found_from_any_of_its_paths(tmp_path: Path, recipe: Config) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(recipe))
    for place in ("", "export", "export-ema", "checkpoints/step-000002"):
        assert recipe_of(labelled(["package:a/b", str(tmp_path / place)]), None) == recipe
    with pytest.raises(ConfigError, match="a run with rewards; give the recipe to measure them by: --config"):
        recipe_of(labelled([str(tmp_path / "samples")]), None)


def test_first_samples_are_kept_and_statistics_are_sorted_by_prompt(tmp_path: Path) -> None:
    """Rows 4 and 7, two samples each, in mixed order; one sample brightens by .1 per frame, the others are still."""
    stats = VideoStats([video_path(tmp_path, row) for row in (4, 7)], samples=2, fps=8.0)
    still = torch.tensor([0.2, 0.6, 0.4])[:, None, None, None, None].expand(3, 5, 3, 16, 16)
    ramp = torch.linspace(0.0, 0.4, 5)[None, :, None, None, None].expand(1, 5, 3, 16, 16)
    stats(RolloutChunk((), still, torch.tensor([1, 0, 0]), torch.tensor([0, 1, 0])))
    stats(RolloutChunk((), ramp, torch.tensor([1]), torch.tensor([1])))
    scores = stats.scores(Mesh(rank=0, world_size=1, device=torch.device("cpu")))
    assert scores["pixel_motion"].tolist() == [[0.0, 0.0], [0.0, pytest.approx(0.1)]]
    assert scores["pixel_diversity"][0].tolist() == pytest.approx([0.2, 0.2], abs=1e-4)
    assert scores["pixel_diversity"][1, 0] == scores["pixel_diversity"][1, 1] > 0
    shades = {path.stem: float(read_video(path)[0].mean()) for path in (tmp_path / "videos").iterdir()}
    assert shades == {"00004": pytest.approx(0.4, abs=0.01), "00007": pytest.approx(0.2, abs=0.01)}


def test_motion_and_diversity_equal_values_computed_by_hand() -> None:
    """A ramp of .1 per frame has motion .1; samples of grey 0, .3 and .9 have distances of .3, .6 and .9."""
    ramp = torch.linspace(0, 0.8, 9)[None, :, None, None, None].expand(1, 9, 3, 40, 24)
    assert motion(ramp).tolist() == pytest.approx([0.1])
    assert thumbnails(ramp).shape == (1, 3 * 8 * 16 * 16)
    assert thumbnails(ramp[:, :1, :, :6, :6]).shape == (1, 3 * 6 * 6)
    shades = torch.tensor([0.0, 0.3, 0.9])[:, None, None, None, None].expand(3, 9, 3, 40, 24)
    apart = diversity(thumbnails(shades)[None])
    assert apart[0].tolist() == pytest.approx([(0.3 + 0.9) / 2, (0.3 + 0.6) / 2, (0.9 + 0.6) / 2], abs=1e-4)
    grain = 0.5 + 0.1 * torch.randn(2, 9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert diversity(thumbnails(grain)[None]).max() < 0.05 < (grain[0] - grain[1]).square().mean().sqrt()
