"""The command `evaluate compare`: scores equal those of `heldout`, and finished blocks are not measured again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpgo_video.commands.evaluate import main
from bpgo_video.config.bpgo import Config
from bpgo_video.config.policy import LoraConfig
from bpgo_video.config.reading import to_yaml
from bpgo_video.data.media import read_video
from bpgo_video.distributed import process_group
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.evaluation import compare, heldout
from bpgo_video.evaluation.compare import Request, measure
from bpgo_video.evaluation.heldout import evaluate_folder
from bpgo_video.inference.conversion import Conversion, convert
from bpgo_video.inference.run_weights import find_checkpoint
from bpgo_video.rewards.base import RewardError
from bpgo_video.training.heldout import heldout_test
from tests.made.written_runs import PROMPTS, tagged_recipe, write_run

ONE_RANK = Mesh(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def recipe_here(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tagged_recipe(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def run_dir(recipe_here: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run that started from the recipe's policy."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    return write_run(Path(recipe_here.policy.folder), folder, LoraConfig(rank=2, alpha=4), recipe_here)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "start_ranks", lambda timeout: ONE_RANK)


def test_scores_equal_those_of_heldout(recipe_here: Config, tmp_path: Path) -> None:
    (found,) = measure([Request(recipe_here.policy.folder, "A")], recipe_here, "raw", tmp_path, ONE_RANK)
    alone = evaluate_folder(recipe_here, ONE_RANK)
    assert found.table("which").tolist() == [line["scores"]["which"] for line in alone["prompts"]]
    assert [(line.prompt, line.tags) for line in found.prompts] == [
        (line["prompt"], line["tags"]) for line in PROMPTS[:3]
    ]
    roles = {name: measure.role for name, measure in found.measures.items()}
    assert roles == {
        "which": "heldout",
        "alignment": "trained",
        "motion": "trained",
        "pixel_motion": "video",
        "pixel_diversity": "video",
    }
    scores = torch.from_numpy(found.table("which"))
    tested = heldout_test(scores, scores, recipe_here)["heldout_measures"]
    assert tested == len(found.roles), "a run's summary corrects for the same number of measures"
    trained = {name: reward.weight for name, reward in recipe_here.trained_rewards.items()}
    assert {name: found.measures[name].weight for name in trained} == trained
    videos = [read_video(path)[0] for path in sorted((found.folder / "videos").glob("*.mp4"))]
    assert [tuple(video.shape) for video in videos] == [(9, 3, 64, 64)] * 3


def test_diversity_compares_the_samples_of_one_prompt(recipe_here: Config, tmp_path: Path) -> None:
    """Two samples have the same distance from each other; with one sample there is no diversity."""
    found, single = (
        measure([Request(recipe_here.policy.folder, "A")], config, "raw", tmp_path, ONE_RANK)[0]
        for config in (
            recipe_here,
            replace(recipe_here, evaluation=replace(recipe_here.evaluation, samples_per_prompt=1)),
        )
    )
    apart = found.table("pixel_diversity")
    assert (apart[:, 0] == apart[:, 1]).all()
    assert (apart > 0).all()
    assert "pixel_diversity" not in single.measures


def test_finished_blocks_survive_an_interruption(
    recipe_here: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks have two prompts and one prompt: the second fails, and the next call measures only that one."""
    monkeypatch.setattr(compare, "BLOCK", 1)
    requests, calls, whole = [Request(recipe_here.policy.folder, "A")], [], heldout.evaluate

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[1].texts)
        if len(calls) == 2:
            raise RewardError("the second block breaks")
        return whole(*arguments)

    monkeypatch.setattr(heldout, "evaluate", counted)
    with pytest.raises(RewardError):
        measure(requests, recipe_here, "raw", tmp_path / "broken", ONE_RANK)
    (resumed,) = measure(requests, recipe_here, "raw", tmp_path / "broken", ONE_RANK)
    texts = [line["prompt"] for line in PROMPTS[:3]]
    assert calls == [tuple(texts[:2]), (texts[2],), (texts[2],)]
    (at_once,) = measure(requests, recipe_here, "raw", tmp_path / "whole", ONE_RANK)
    assert resumed == at_once
    assert sorted(path.name for path in resumed.folder.iterdir()) == ["scores.json", "videos"]
    made = len(calls)
    assert measure(requests, recipe_here, "raw", tmp_path / "whole", ONE_RANK)[0] == at_once
    assert len(calls) == made
    other_seed = replace(recipe_here, run=replace(recipe_here.run, seed=1))
    (other,) = measure(requests, other_seed, "raw", tmp_path / "whole", ONE_RANK)
    assert len(calls) == made + 2
    assert other.folder != at_once.folder


def test_a_checkpoint_and_its_conversion_have_the_same_scores(
    recipe_here: Config, run_dir: Path, tmp_path: Path
) -> None:
    convert(Conversion(find_checkpoint(run_dir), "raw", tmp_path / "converted"), "diffusers")
    requests = [Request(str(run_dir), "run"), Request(str(tmp_path / "converted"), "converted")]
    run, converted = measure(requests, recipe_here, "raw", tmp_path, ONE_RANK)
    assert run.prompts == converted.prompts
    assert (run.run, run.step, converted.run) == (str(run_dir), 2, None)
    assert run.starts_from != converted.starts_from
    (base,) = measure([Request(recipe_here.policy.folder, "base")], recipe_here, "raw", tmp_path, ONE_RANK)
    assert base.prompts != run.prompts
    assert base.starts_from == run.starts_from


def test_the_command_writes_both_files_and_compares_saved_results_without_ranks(
    recipe_here: Config,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    assert main(["compare", recipe_here.policy.folder, str(run_dir), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    content = json.loads((output / "comparison.json").read_text())
    assert [model["label"] for model in content["models"]] == ["wan", "mine"]
    assert content["comparisons"][0]["outcome"] == "no difference shown", "three prompts cannot show a difference"
    assert "No difference shown between wan and mine" in " ".join(printed.split())
    assert (output / "report.html").read_text().count("<video ") == 6
    monkeypatch.setattr(process_group, "start_ranks", lambda: pytest.fail("no ranks are needed"))
    folders = [f"before={content['models'][0]['results']}", f"after={content['models'][1]['results']}"]
    assert main(["compare", *folders, "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "comparison.json").read_text())
    assert again["comparisons"][0]["effects"] == content["comparisons"][0]["effects"]
    assert [model["label"] for model in again["models"]] == ["before", "after"]


def test_models_that_cannot_be_compared_are_errors(
    recipe_here: Config, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(
        to_yaml(replace(recipe_here, rewards={"pixel_motion": recipe_here.rewards["motion"]}))
    )
    policy, output = recipe_here.policy.folder, ["--output", str(tmp_path / "out")]
    for code, arguments, words in (
        (2, [policy], "a comparison needs two models or more, but only 1 is given"),
        (
            2,
            [policy, policy],
            "none of the models is a run with rewards; give the recipe to measure them by: --config",
        ),
        (2, [policy, "no/such/folder", "--config", str(run_dir / "config.yaml")], "'no/such/folder' does not exist"),
        (
            2,
            [policy, str(run_dir), "--config", str(tmp_path / "recipe.yaml")],
            "names that a comparison uses for its own measures",
        ),
        (2, [policy, str(run_dir), "--weights", "ema"], "its run kept no average"),
    ):
        assert main(["compare", *arguments, *output]) == code, arguments
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "comparison.json").exists()
