"""The command `evaluate heldout`: it reports the scores of a training run as a table and as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpgo_video.commands.evaluate import main
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.reading import to_yaml
from bpgo_video.distributed import process_group
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.evaluation.comparison import PromptLine
from bpgo_video.evaluation.heldout import by_tag, evaluate_folder, with_changes
from bpgo_video.training.heldout import stderr
from tests.made.random_wan import random_wan
from tests.made.written_runs import PROMPTS, tagged_recipe

ONE_RANK = Mesh(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def recipe_here(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tagged_recipe(tmp_path_factory.mktemp("evaluate"))


def tagged(scores: list[list[float]], tags: list[list[str]]) -> dict:
    return by_tag([PromptLine(row, "", tags[row], {"which": own}) for row, own in enumerate(scores)], "which")


def test_mean_and_standard_error_are_reported_per_tag() -> None:
    """The two samples of prompts 0 and 2 have variance 2, those of prompt 1 variance 0."""
    scores = [[0.0, 2.0], [5.0, 5.0], [6.0, 8.0]]
    found = tagged(scores, [["clear"], ["open", "rare"], ["clear"]])
    assert list(found) == ["all", "clear", "open", "rare"]
    assert found["all"] == {"mean": pytest.approx(26 / 6), "stderr": pytest.approx((1 + 1) ** 0.5 / 3), "prompts": 3}
    assert found["clear"] == {"mean": 4.0, "stderr": pytest.approx(2**0.5 / 2), "prompts": 2}
    assert found["open"] == found["rare"] == {"mean": 5.0, "stderr": 0.0, "prompts": 1}


def test_one_video_has_no_standard_error() -> None:
    assert tagged([[3.0]], [[]]) == {"all": {"mean": 3.0, "stderr": None, "prompts": 1}}


def test_scores_are_matched_to_prompts_and_reproducible(recipe_here: Config) -> None:
    config = with_changes(recipe_here, samples_per_prompt=3)
    content = evaluate_folder(config, ONE_RANK)
    assert [(line["prompt"], line["tags"]) for line in content["prompts"]] == [
        (line["prompt"], line["tags"]) for line in PROMPTS[:3]
    ]
    for line in content["prompts"]:
        scores = line["scores"]["which"]
        assert len(set(scores)) == 3, "all samples differ"
        assert all(0 < score - len(line["prompt"]) < 1 for score in scores)
    assert content["rewards"]["which"]["version"] == "7"
    table = torch.tensor([line["scores"]["which"] for line in content["prompts"]])
    assert content["rewards"]["which"]["by_tag"]["all"]["stderr"] == pytest.approx(stderr(table))
    assert evaluate_folder(config, ONE_RANK) == content
    other = evaluate_folder(with_changes(config, seed=1), ONE_RANK)
    assert other["prompts"] != content["prompts"]
    fewer = evaluate_folder(with_changes(config, samples_per_prompt=2), ONE_RANK)
    for first, second in zip(content["prompts"], fewer["prompts"], strict=True):
        assert second["scores"]["which"] == pytest.approx(first["scores"]["which"][:2], abs=1e-5)


def test_the_command_prints_a_table_and_writes_json(
    recipe_here: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process_group, "start_ranks", lambda timeout: ONE_RANK)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe_here))
    other = random_wan(tmp_path / "other", seed=1)
    for part in ("text_encoder", "tokenizer"):  # another transformer with the same text encoder, as after training
        for file in (Path(recipe_here.policy.folder) / part).iterdir():
            (other / part / file.name).write_bytes(file.read_bytes())
    command = ["heldout", "--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "scores.json")]
    assert main([*command, "--policy", str(other), "--split", "train", "--samples-per-prompt", "2", "--seed", "3"]) == 0
    content = json.loads((tmp_path / "scores.json").read_text())
    assert (content["policy"], content["split"], content["seed"]) == (str(other), "train", 3)
    assert [line["prompt"] for line in content["prompts"]] == [line["prompt"] for line in PROMPTS[3:]]
    mean = content["rewards"]["which"]["by_tag"]["all"]["mean"]
    assert re.search(rf"which\W+all\W+{mean:.4f} .+ 2 \W+ 4 ", capsys.readouterr().out)
    assert main([*command, "--split", "none"]) == 2
    assert "no split 'none'" in capsys.readouterr().err
    assert main([*command, "--policy", "no/such/folder"]) == 2
    assert "model folder 'no/such/folder' does not exist" in capsys.readouterr().err
    assert main(["heldout", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml' is neither a file nor a shipped recipe" in capsys.readouterr().err


def test_a_recipe_without_heldout_rewards_is_an_error(recipe_here: Config) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.rewards is empty"):
        with_changes(replace(recipe_here, evaluation=replace(recipe_here.evaluation, rewards={})))
