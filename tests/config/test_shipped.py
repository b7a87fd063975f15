"""Lookup of shipped recipes and DeepSpeed configurations by name; an existing file takes precedence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bpgo_video.commands.shipped import recipes
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.reading import DS_CONFIGS, RECIPES, ds_config_file, read_recipe, read_yaml, recipe_file, shipped
from bpgo_video.training.run_folder import check_same_run
from tests.made.recipes import ROOT


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_package_ships_the_files_of_the_repository() -> None:
    assert RECIPES.resolve() == ROOT / "pipelines" / "configs"
    assert DS_CONFIGS.resolve() == ROOT / "ds_configs"


@pytest.mark.parametrize("name", shipped(RECIPES))
def test_a_recipe_is_found_with_or_without_its_suffix(name: str) -> None:
    assert recipe_file(name) == recipe_file(f"{name}.yaml") == RECIPES / f"{name}.yaml"
    assert ds_config_file(read_recipe(Path(name)).deepspeed).parent == DS_CONFIGS


def test_a_file_takes_precedence_over_a_name() -> None:
    changed = yaml.safe_load(recipe_file("tiny_wan_bpgo").read_text()) | {"run": {"dir": "runs/here"}}
    Path("tiny_wan_bpgo").write_text(yaml.safe_dump(changed))
    assert read_yaml(Path("tiny_wan_bpgo")).run.dir == "runs/here"
    Path("zero3").write_text("{}")
    assert ds_config_file("zero3") == Path("zero3")


@pytest.mark.parametrize(
    ("find", "name", "message"),
    [
        (
            recipe_file,
            "tiny_wan_bpg",
            "recipe 'tiny_wan_bpg' is neither a file nor a shipped recipe; perhaps you meant",
        ),
        (recipe_file, "pipelines/configs/tiny_wan_bpgo.yaml", "perhaps you meant tiny_wan_bpgo or"),
        (recipe_file, "x", "'x' is neither a file nor a shipped recipe; `bpgo-video recipes` lists them"),
        (ds_config_file, "ds_configs/zero3.json", "deepspeed 'ds_configs/zero3.json' is neither a file nor a shipped"),
        (ds_config_file, "zero4", "zero1, zero2, zero2_bf16, zero3, zero3_bf16, zero3_bf16_offload, zero3_offload"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(find, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        find(name)
    assert message in str(error.value)


def test_a_base_is_a_file_next_to_the_recipe_or_a_shipped_recipe() -> None:
    folder = Path("elsewhere")
    folder.mkdir()
    mine = folder / "mine.yaml"
    mine.write_text("base: tiny_wan_bpgo\noptim: {learning_rate: 3.0e-5}\n")
    assert read_yaml(mine).rollout == read_yaml(Path("tiny_wan_bpgo")).rollout
    (folder / "tiny_wan_bpgo").write_text("base: tiny_wan_bpgo.yaml\nrollout: {prompts_per_step: 6}\n")
    assert read_yaml(mine).rollout.prompts_per_step == 6


def test_a_copied_recipe_equals_the_shipped_one_and_is_never_overwritten(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in shipped(RECIPES):
        assert recipes(["copy", name, f"{name}-copy.yaml"]) == 0
        assert read_recipe(Path(f"{name}-copy.yaml")) == read_recipe(Path(name))
    assert recipes(["copy", "tiny_wan_bpgo"]) == 0
    Path("tiny_wan_bpgo.yaml").write_text("mine")
    assert recipes(["copy", "tiny_wan_bpgo"]) == 2
    assert "tiny_wan_bpgo.yaml exists and is not overwritten; name another FILE" in capsys.readouterr().err
    assert Path("tiny_wan_bpgo.yaml").read_text() == "mine"


def test_recipes_are_listed_one_per_line_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in shipped(RECIPES):
        (line,) = [line for line in lines if line.split(" ", 1)[0] == name]
        assert line.endswith("."), "the first line of a recipe is a sentence"
    assert recipes(["show", "tiny_wan_grpo"]) == 0
    assert capsys.readouterr().out == recipe_file("tiny_wan_grpo").read_text()
    assert recipes(["show", "tiny_wan_gpro"]) == 2
    assert "perhaps you meant tiny_wan_grpo" in capsys.readouterr().err


def test_a_run_resumes_if_its_deepspeed_json_changes_from_a_path_to_a_name() -> None:
    named = read_yaml(Path("tiny_wan_bpgo"))
    check_same_run(replace(named, deepspeed="ds_configs/zero3.json"), named)
