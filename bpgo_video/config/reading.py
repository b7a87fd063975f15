"""Recipes from YAML, read strictly: unknown keys are errors that name the nearest known one.

Recipes and DeepSpeed configurations are named by a file, or by the name of one that ships with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import bpgo_video
from bpgo_video import documents
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.fields import explain
from bpgo_video.config.rules import Replacement, check, method_defaults
from bpgo_video.config.secrets import check_secrets
from bpgo_video.config.sft import Recipe, SftConfig, check_sft
from bpgo_video.documents import plain_yaml, read_text
from bpgo_video.errors import shown, suggestion, unknown

PACKAGE = Path(bpgo_video.__file__).parent
RECIPES = PACKAGE / "recipes"  # a link to pipelines/configs in the repository
DS_CONFIGS = PACKAGE / "ds_configs"  # a link to ds_configs in the repository
TREES: dict[str, type[Recipe]] = {"bpgo": Config, "sft": SftConfig}  # by the recipe's kind
CHECKS: dict[str, Callable[[Any], None]] = {"bpgo": check, "sft": check_sft}


def config_from_dict(
    tree: dict[str, Any],
    source: str = "config",
    written: AbstractSet[str] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Recipe:
    """The recipe in plain YAML data, of the kind that its key `recipe` names.

    While it breaks a rule, the methods that it names replace settings that the user did not write (`rules.METHODS`).

    Args:
        source: where the data come from, for errors.
        written: keys, such as loss.ratio, that the user wrote; the rest comes from shipped recipes. None are all.
        report: receives a line for each value of a shipped recipe that a method replaces.

    Raises:
        ConfigError: a key is unknown or missing, a value is out of range, or values do not go together.
    """
    replaced = method_defaults(tree, _keys(tree) if written is None else written)
    changes: list[Replacement] = []
    while True:
        try:
            config = _checked(_changed(tree, changes), source)
            break
        except ConfigError:
            if (change := next(replaced, None)) is None:
                raise
            changes.append(change)
    for change in list(changes):  # some may have come before the one that helped
        others = [other for other in changes if other is not change]
        with suppress(ConfigError):
            config, changes = _checked(_changed(tree, others), source), others
    for *_, reason in changes:
        if reason:
            report(reason)
    return config


def _changed(tree: dict[str, Any], changes: Iterable[Replacement]) -> dict[str, Any]:
    for section, name, value, _ in changes:
        tree = tree | {section: {**tree.get(section, {}), name: value}}
    return tree


def _checked(tree: dict[str, Any], source: str) -> Recipe:
    check_secrets(tree, source)
    kind = tree.get("recipe", "bpgo")
    if not isinstance(kind, str) or kind not in TREES:
        raise ConfigError(f"{source}:\n  {unknown('recipe', kind, TREES)}")
    try:
        config: Recipe = TypeAdapter(TREES[kind]).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, source, TREES[kind])) from None
    CHECKS[kind](config)
    return config


def to_yaml(config: Recipe) -> str:
    """The recipe with all its defaults, as `read_recipe` reads it."""
    return documents.to_yaml(TypeAdapter(type(config)).dump_python(config, mode="json"))


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, or the shipped recipe of that name; see `read_tree` for `base`."""
    return read_written(path)[0]


def read_written(path: Path) -> tuple[Recipe, set[str]]:
    """`read_recipe`, and the keys that files of the user hold."""
    tree, written = read_tree(recipe_file(path))
    return config_from_dict(tree, str(path), written), written


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


def read_tree(path: Path, derived: tuple[Path, ...] = ()) -> tuple[dict[str, Any], set[str]]:
    """Plain data of a recipe file, merged into its `base`: a file next to it, or a shipped recipe.

    `rewards` and `evaluation.rewards` replace those of the base, so that one file shows what a policy is trained on.

    Args:
        derived: the files that have this one as their base.

    Returns:
        the data, and their keys that files of the user hold.
    """
    if path.resolve() in derived:
        raise ConfigError(f"{path} is its own base, by way of {' -> '.join(map(str, derived))}")
    tree = plain_yaml(read_text(path), path)
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {shown(tree)}"
        raise ConfigError(f"{path} {found}; a recipe is a mapping with the keys of `bpgo-video train --help`")
    if other := [key for key in tree if not isinstance(key, str)]:
        raise ConfigError(f"{path} has the key {shown(other[0])}; the sections of a recipe have names")
    written = set() if path.resolve().parent == RECIPES.resolve() else _keys(tree)
    base = tree.pop("base", None)
    if base is None:
        return tree, written
    below, below_written = read_tree(base_file(str(base), path), (*derived, path.resolve()))
    return _merged(below, tree), below_written | written


def _keys(tree: dict[str, Any]) -> set[str]:
    return {f"{name}.{key}" for name, section in tree.items() if isinstance(section, dict) for key in section}


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "rewards"
        merged[key] = _merged(base[key], value) if is_section else value
    return merged


def shipped(folder: Path) -> list[str]:
    """Names in RECIPES or DS_CONFIGS."""
    return sorted(path.stem for path in folder.iterdir() if path.suffix in (".yaml", ".json"))


def recipe_file(name: Path | str) -> Path:
    """A file if there is one, else the shipped recipe of that name, with or without `.yaml`.

    Raises:
        ConfigError: neither; names the nearest shipped ones.
    """
    return _file_or_shipped(Path(name), str(name), RECIPES, "recipe")


def base_file(name: str, recipe: Path) -> Path:
    """The `base` of a recipe: a file next to it, else a shipped recipe. Raises ConfigError as `recipe_file`."""
    return _file_or_shipped(recipe.parent / name, name, RECIPES, f"{recipe}: base")


def ds_config_file(name: str) -> Path:
    """A DeepSpeed JSON, else the shipped one of that name, with or without `.json`. Raises ConfigError if neither."""
    return _file_or_shipped(Path(name), name, DS_CONFIGS, "deepspeed")


def is_present(file: Path) -> bool:
    """Whether there is a file; no file has a name that the system does not accept."""
    try:
        return file.is_file()
    except OSError:  # a name that is too long
        return False


def _file_or_shipped(file: Path, name: str, folder: Path, key: str) -> Path:
    if is_present(file):
        return file
    known = {path.stem: path for path in folder.iterdir()}
    bare = name.removesuffix(".yaml").removesuffix(".json")
    if bare in known:
        return known[bare]
    hint = suggestion(Path(bare).name, known, limit=2, cutoff=0.5)
    kind, listed = "recipe", "`bpgo-video recipes` lists them"
    if folder == DS_CONFIGS:
        kind, listed = "DeepSpeed configuration", f"they are {', '.join(shipped(DS_CONFIGS))}"
    raise ConfigError(f"{key} {name!r} is neither a file nor a shipped {kind}{hint}; {listed}")
