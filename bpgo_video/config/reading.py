"""Configurations from YAML, read strictly: unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.rules import check
from bpgo_video.config.sft import Recipe, SftConfig, check_sft
from bpgo_video.config.shipped import base_file, recipe_file


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of recipe: the class of its tree, and what checks that its values go together."""

    tree: type
    check: Callable[[Any], None]


KINDS: Mapping[str, Kind] = MappingProxyType({"bpgo": Kind(Config, check), "sft": Kind(SftConfig, check_sft)})


def _kind(tree: Mapping[str, Any], source: str) -> Kind:
    name = tree.get("recipe", "bpgo")
    if name not in KINDS:
        raise ConfigError(f"{source}:\n  recipe: {name!r} is not known; it is one of {', '.join(KINDS)}")
    return KINDS[name]


def _known_keys(root: type, path: Sequence[Any]) -> list[str]:
    """Keys of the dataclass at `path` in the tree, for a suggestion; empty where there is none."""
    node: Any = root
    for key in path:
        if dataclasses.is_dataclass(node):
            node = get_type_hints(node).get(key)
        elif get_origin(node) is dict:
            node = get_args(node)[1]
    return [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []


def explain(error: ValidationError, source: str, root: type) -> str:
    """What pydantic refuses of a tree of class `root`, a line a value; `source` is where the values stand."""
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        name = ".".join(path)
        if problem["type"] == "unexpected_keyword_argument":
            near = difflib.get_close_matches(path[-1], _known_keys(root, path[:-1]), n=1, cutoff=0.4)
            hint = f"; perhaps you meant {near[0]!r}" if near else ""
            lines.append(f"{name}: unknown key{hint}")
        elif problem["type"] in ("missing", "missing_argument"):
            lines.append(f"{name}: required, and not given")
        else:
            lines.append(f"{name}: {problem['msg']} (given: {problem['input']!r})")
    return f"{source}:\n  " + "\n  ".join(lines)


def config_from_dict(tree: dict[str, Any], source: str = "config") -> Recipe:
    """The typed tree behind plain YAML data, of the kind that its `recipe` names.

    Raises:
        ConfigError: an unknown key (names the nearest known one), a missing one, or a value out of range.
    """
    kind = _kind(tree, source)
    try:
        config: Recipe = TypeAdapter(kind.tree).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, source, kind.tree)) from None
    kind.check(config)
    return config


def to_yaml(config: Recipe) -> str:
    """The resolved configuration, readable by `read_recipe` again."""
    tree = TypeAdapter(type(config)).dump_python(config, mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def read_recipe(path: Path) -> Recipe:
    """The configuration in a YAML file, or of a shipped name, of any kind; see `read_tree` for `base`."""
    return config_from_dict(read_tree(recipe_file(path)), str(path))


def read_yaml(path: Path) -> Config:
    """`read_recipe` of kind bpgo. Raises ConfigError if it is of another."""
    recipe = check_kind(read_recipe(path), "bpgo", str(path))
    assert isinstance(recipe, Config)
    return recipe


def check_kind(recipe: Recipe, kind: str, source: str) -> Recipe:
    """The recipe, if it is of that kind. Raises ConfigError if it is of another."""
    if recipe.recipe != kind:
        raise ConfigError(
            f"{source} is a recipe of kind {recipe.recipe!r}; this command takes recipes of kind {kind!r}"
        )
    return recipe


def read_tree(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Plain data of a recipe file. Its `base`, a file next to it or a shipped recipe, has the values that it changes.

    `rewards` and `evaluation.rewards` are replaced as a whole: what a policy is trained on is read in one place.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path} is its own base, by way of {' -> '.join(map(str, above))}")
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}; a mapping with the keys of `--help` is needed")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return _merged(read_tree(base_file(str(base), path), (*above, path.resolve())), tree)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "rewards"
        merged[key] = _merged(base[key], value) if both else value
    return merged
