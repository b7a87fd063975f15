"""Recipes and DeepSpeed configurations by name: a file, or one that ships with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

import bpgo_video
from bpgo_video.config.bpgo import ConfigError

PACKAGE = Path(bpgo_video.__file__).parent
RECIPES = PACKAGE / "recipes"  # a link to pipelines/configs in the repository
DS_CONFIGS = PACKAGE / "ds_configs"  # a link to ds_configs in the repository


def shipped(folder: Path) -> list[str]:
    """Names in RECIPES or DS_CONFIGS."""
    return sorted(path.stem for path in folder.iterdir() if path.suffix in (".yaml", ".json"))


def recipe_file(name: Path | str) -> Path:
    """A file if there is one, else the shipped recipe of that name, with or without `.yaml`.

    Raises:
        ConfigError: neither; names the nearest shipped ones.
    """
    return _found(Path(name), str(name), RECIPES, "recipe", "recipe", "`bpgo-video recipes` lists them")


def base_file(name: str, recipe: Path) -> Path:
    """The `base` of a recipe: a file next to it, else a shipped recipe. Raises ConfigError as `recipe_file`."""
    said = f"{recipe}: base"
    return _found(recipe.parent / name, name, RECIPES, said, "recipe", "`bpgo-video recipes` lists them")


def ds_config_file(name: str) -> Path:
    """A DeepSpeed JSON, else the shipped one of that name, with or without `.json`. Raises ConfigError if neither."""
    listed = f"they are {', '.join(shipped(DS_CONFIGS))}"
    return _found(Path(name), name, DS_CONFIGS, "deepspeed", "DeepSpeed configuration", listed)


def _found(file: Path, name: str, folder: Path, said: str, kind: str, listed: str) -> Path:
    if file.is_file():
        return file
    known = {path.stem: path for path in folder.iterdir()}
    bare = name.removesuffix(".yaml").removesuffix(".json")
    if bare in known:
        return known[bare]
    near = difflib.get_close_matches(Path(bare).name, known, n=2, cutoff=0.5)
    hint = f"; perhaps you meant {' or '.join(near)}" if near else ""
    raise ConfigError(f"{said} {name!r} is neither a file nor a shipped {kind}{hint}; {listed}")
