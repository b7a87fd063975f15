"""Recipes from YAML, read strictly: unknown keys are errors that name the nearest known one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.fields import explain
from bpgo_video.config.rules import check
from bpgo_video.config.sft import Recipe, SftConfig, check_sft
from bpgo_video.config.shipped import base_file, recipe_file
from bpgo_video.errors import unknown

TREES: dict[str, type[Recipe]] = {"bpgo": Config, "sft": SftConfig}  # by the recipe's kind
CHECKS: dict[str, Callable[[Any], None]] = {"bpgo": check, "sft": check_sft}


def config_from_dict(tree: dict[str, Any], source: str = "config") -> Recipe:
    """The recipe in plain YAML data, of the kind that its key `recipe` names.

    Raises:
        ConfigError: a key is unknown or missing, a value is out of range, or values do not go together.
    """
    kind = tree.get("recipe", "bpgo")
    if kind not in TREES:
        raise ConfigError(f"{source}:\n  {unknown('recipe', kind, TREES)}")
    try:
        config: Recipe = TypeAdapter(TREES[kind]).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, source, TREES[kind])) from None
    CHECKS[kind](config)
    return config


def to_yaml(config: Recipe) -> str:
    """The recipe with all its defaults, as `read_recipe` reads it."""
    tree = TypeAdapter(type(config)).dump_python(config, mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, or the shipped recipe of that name; see `read_tree` for `base`."""
    return config_from_dict(read_tree(recipe_file(path)), str(path))


def read_yaml(path: Path) -> Config:
    """`read_recipe` of kind bpgo. Raises ConfigError if it is of another kind."""
    recipe = check_kind(read_recipe(path), "bpgo", str(path))
    assert isinstance(recipe, Config)
    return recipe


def check_kind(recipe: Recipe, kind: str, source: str) -> Recipe:
    """The recipe. Raises ConfigError if it is of another kind."""
    if recipe.recipe != kind:
        raise ConfigError(
            f"{source} is a recipe of kind {recipe.recipe!r}; this command takes recipes of kind {kind!r}"
        )
    return recipe


def read_tree(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Plain data of a recipe file, merged into its `base`: a file next to it, or a shipped recipe.

    `rewards` and `evaluation.rewards` replace those of the base, so that one file shows what a policy is trained on.

    Args:
        derived: the files that have this one as their base.
    """
    if path.resolve() in derived:
        raise ConfigError(f"{path} is its own base, by way of {' -> '.join(map(str, derived))}")
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}; a mapping with the keys of `--help` is needed")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merged(read_tree(base_file(str(base), path), (*derived, path.resolve())), tree)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "rewards"
        merged[key] = _merged(base[key], value) if is_section else value
    return merged
