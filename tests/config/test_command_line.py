"""Command-line flags override recipe values, with the same checks and messages as YAML, printed once per host."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.command_line import load_config, load_recipe
from bpgo_video.config.reading import read_recipe, read_yaml, to_yaml
from bpgo_video.config.sft import SftConfig
from tests.made.recipes import RECIPE, ROOT

SFT = ROOT / "pipelines" / "configs" / "tiny_wan_sft.yaml"
NAMES = {"recipe": str(RECIPE), "sft": str(SFT)}


NAMES_OF = {
    "--lr": "--optim.learning-rate",
    "--learning_rate": "--optim.learning-rate",
    "--steps": "--run.num-steps",
    "--epochs": "--run.num-steps",
    "--batch_size": "--rollout.prompts-per-step",
    "--seed": "--run.seed",
    "--output_dir": "--run.dir",
    "--resume": "--run.resume",
    "--gpus": "--ranks",
    "--lora_rank": "--policy.lora.rank",
    "--guidance": "--sampler.guidance-scale",
    "--num_frames": "--video.num-frames",
}


def test_flags_override_the_values_of_the_file() -> None:
    flags = ["--config", str(RECIPE), "--run.num-steps", "3", "--run.seed", "7"]
    config = load_config([*flags, "--rewards.motion.weight", "0.25", "--policy.lora.rank", "8"])
    assert (config.run.num_steps, config.run.seed, config.policy.lora.rank) == (3, 7, 8)
    assert config.rewards["motion"].weight == 0.25
    assert config.video == read_yaml(RECIPE).video


def test_the_first_word_can_be_the_recipe() -> None:
    assert load_recipe([str(RECIPE), "--run.seed", "7"]) == load_recipe(["--config", str(RECIPE), "--run.seed", "7"])


def test_the_kind_of_recipe_determines_the_flags() -> None:
    config = load_recipe(["--config", str(SFT), "--sft.batch-size", "64", "--optim.learning-rate", "1e-3"])
    assert (config.recipe, config.sft.batch_size, config.optim.learning_rate) == ("sft", 64, 1e-3)


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ("recipe", "--run.sead 3", "--run.sead: unknown flag; perhaps you meant --run.seed"),
        ("recipe", "--rewards.motion.wieght=3", "perhaps you meant --rewards.motion.weight"),
        *(("recipe", f"{flag} 3", f"{flag}: unknown flag; perhaps you meant {key}") for flag, key in NAMES_OF.items()),
        ("sft", "--batch_size 3", "perhaps you meant --sft.batch-size"),
        ("recipe", "--num-steps 3", "--run.num-steps or --sampler.num-steps or --evaluation.num-steps"),
        (
            "recipe",
            "--loss.objective nft --loss.step-weights flash",
            "loss.step_weights is 'flash' with loss.objective",
        ),
        (
            "recipe",
            "--rollout.same-start true",
            "'true' belongs to no flag; switches take no value: write --rollout.same-start or --rollout.no-same-start",
        ),
        ("recipe", "--policy.no-vae-tiling 1", "write --policy.vae-tiling or --policy.no-vae-tiling"),
        ("recipe", "--rollout.group-size 8 9", "'9' belongs to no flag; --help lists all"),
        (
            "recipe",
            "--run.num-steps x",
            "error: command line: --run.num-steps: invalid literal for int() with base 10: 'x'",
        ),
        ("recipe", "--optim.betas 0.5", "Missing value for argument '--optim.betas'. Expected 2 values"),
        ("recipe", "--optim.learning-rate -1", "optim.learning_rate: Input should be greater than 0 (given: -1.0)"),
        ("recipe", "--optim.betas 0.5 2", "optim.betas.1: Input should be less than or equal to 1 (given: 2.0)"),
        ("recipe", "--optim.updates-per-rollout 99", "each update needs one of its own"),
        (
            "nowhere.yaml",
            "",
            "recipe 'nowhere.yaml' is neither a file nor a shipped recipe; `bpgo-video recipes` lists",
        ),
        ("sft", "", f"{SFT} is a recipe of kind 'sft'; this command takes recipes of kind 'bpgo'"),
    ],
)
def test_an_error_is_explained_and_exits_with_code_2(
    config: str, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        (load_recipe if flags else load_config)(["--config", NAMES.get(config, config), *flags.split()])
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out) == (2, "")
    assert shown.err.startswith("error: ")
    assert message in shown.err


@pytest.mark.parametrize("flags", [[], ["--config", str(RECIPE), "--run.sead", "3"], ["--config", "no.yaml"]])
def test_only_one_rank_per_host_prints_an_error(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("1", 1), ("0", 0)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            load_recipe(flags)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("error:") == lines


def help_of(flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        load_recipe([*flags, "--help"], prog="tool", description="What the tool does.\n\n    an example")
    assert stopped.value.code == 0
    return "\n".join(line.strip() for line in capsys.readouterr().out.splitlines())


def keys(tree: Any, above: str = "") -> Iterator[str]:
    """The flag name of every recipe key."""
    hints = get_type_hints(tree)
    for field in fields(tree):
        name = f"{above}{field.name.replace('_', '-')}"
        if is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{name}.")
        elif not any(is_dataclass(part) for part in get_args(hints[field.name])):
            yield name


@pytest.mark.parametrize(("tree", "flags"), [(Config, []), (SftConfig, ["--config", str(SFT)])])
def test_every_key_has_a_help_text(
    tree: Any, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The help of each flag has a sentence besides the default."""
    text = help_of(flags, capsys, monkeypatch)
    found = re.findall(r"^--([\w.-]+)[^\n]*(?:\n--\S+\.no-\S+)?\n((?:(?!--)[^\n]*\n)*)", text, re.MULTILINE)
    explained = {flag for flag, words in found if re.search(r"\w{3}[ .]", words.rpartition("(default:")[0] or words)}
    assert not [key for key in keys(tree) if key not in explained]


def test_help_without_a_recipe_shows_the_required_flags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of([], capsys, monkeypatch)
    assert text.startswith("usage: tool RECIPE [FLAGS]\n\nWhat the tool does.\n\nan example\n\nRECIPE ")
    sections = [line.removesuffix(" options") for line in text.splitlines() if line.endswith(" options")]
    assert sections[:3] == ["run", "data", "policy"], "the essentials come first"
    assert re.search(r"--run\.dir STR\n[^-]*\(required\)", text)
    assert "--rewards.NAME.model" in text
    assert "How rewards become advantages" in text, "a section has a description"


def test_help_of_a_recipe_shows_its_values(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(["--config", str(RECIPE)], capsys, monkeypatch)
    assert re.search(rf"--run\.dir STR\n[^-]*\(default: {re.escape(read_yaml(RECIPE).run.dir)}\)", text)
    assert "--rewards.motion.weight" in text


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_without_flags_the_recipe_equals_its_file(path: Path) -> None:
    assert load_recipe(["--config", str(path)]) == read_recipe(path)


def test_nested_options_pass_through_unchanged(tmp_path: Path) -> None:
    """Options of a reward and of its second scoring are nested plain data; unrelated flags leave them unchanged."""
    options = {
        "model": "x",
        "answers": ["Yes", "No"],
        "settings": {"depth": 2, "none": None},
        "limit": None,
        "on": True,
    }
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["rewards"]["motion"] |= {"options": options, "rescorings": [{"answers": ["Ja"]}]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    found = load_config(["--config", str(path), "--rewards.motion.options.settings.depth", "3"])
    assert found.rewards["motion"].rescorings == ({"answers": ["Ja"]},)
    assert found.rewards["motion"].options == options | {"settings": {"depth": 3, "none": None}}


METHODS = [
    ("tiny_wan_bpgo", "--loss.objective awm", {"loss.step_weights": "none", "rollout.same_start": False}),
    ("tiny_wan_longcat", "--loss.objective nft", {"loss.step_weights": "none", "rollout.same_start": False}),
    (
        "tiny_wan_paper",
        "--loss.objective dpo",
        {
            "loss.step_weights": "none",
            "rollout.same_start": False,
            "sampler.share_steps": "batch",
            "bpgo.zeta": 0.0,
            "bpgo.trust": "none",
        },
    ),
    ("tiny_wan_bpgo", "--prior.kind none", {"bpgo.zeta": 0.0}),
    ("tiny_wan_paper", "--prior.kind none", {"bpgo.zeta": 0.0, "bpgo.alpha": 0.0}),
    ("tiny_wan_bpgo", "--prior.kind none --bpgo.trust none", {"bpgo.zeta": 0.0}),
    ("tiny_wan_bpgo", "--advantage.normalise max_std", {"bpgo.alpha": 0.0}),
    ("tiny_wan_bpgo", "--evaluation.weights ema", {"ema.decay": 0.99}),
    ("tiny_wan_sft", "--evaluation.weights ema --ema.decay 0.5", {}),
    ("tiny_wan_released", "--bpgo.form paper", {"bpgo.alpha": 0.5}),
]


@pytest.mark.parametrize(("recipe", "words", "replaced"), METHODS)
def test_a_method_replaces_what_it_cannot_use_of_a_shipped_recipe(
    recipe: str, words: str, replaced: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing else changes. A file with that `base` gives the same, and the resolved recipe reads as itself."""
    notes: list[str] = []
    config = load_recipe([recipe, *words.split()], report=notes.append)
    before = read_recipe(Path(recipe))
    given = dict(zip(words.replace("--", "").split()[::2], words.split()[1::2], strict=True))
    wanted = values(before) | {key: yaml.safe_load(value) for key, value in given.items()} | replaced
    assert values(config) == wanted
    assert sorted(note.partition(" ")[0] for note in notes) == sorted(replaced)
    tree: dict[str, Any] = {"base": recipe}
    for key, value in given.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = yaml.safe_load(value)
    for text in (yaml.safe_dump(tree), to_yaml(config)):
        (tmp_path / "recipe.yaml").write_text(text)
        assert read_recipe(tmp_path / "recipe.yaml") == config


def values(config: Any) -> dict[str, Any]:
    """The settings of all sections, by dotted key."""
    sections = {name: vars(section) for name, section in vars(config).items() if is_dataclass(section)}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def test_what_a_user_wrote_is_never_replaced(tmp_path: Path) -> None:
    base, recipe = tmp_path / "base.yaml", tmp_path / "recipe.yaml"
    base.write_text("base: tiny_wan_full\nloss: {step_weights: flash}\n")
    recipe.write_text("base: base.yaml\nloss: {objective: nft}\n")
    with pytest.raises(
        ConfigError, match=r"loss\.step_weights is 'flash' with loss\.objective = 'nft'.*set it to 'none'"
    ):
        read_recipe(recipe)
