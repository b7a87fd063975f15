"""Recipes and DeepSpeed configurations by name: a file, or one that ships with the package."""

from __future__ import annotations

from pathlib import Path

import bpgo_video
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.errors import suggestion

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
    return _file_or_shipped(Path(name), str(name), RECIPES, "recipe")


def base_file(name: str, recipe: Path) -> Path:
    """The `base` of a recipe: a file next to it, else a shipped recipe. Raises ConfigError as `recipe_file`."""
    return _file_or_shipped(recipe.parent / name, name, RECIPES, f"{recipe}: base")


def ds_config_file(name: str) -> Path:
    """A DeepSpeed JSON, else the shipped one of that name, with or without `.json`. Raises ConfigError if neither."""
    return _file_or_shipped(Path(name), name, DS_CONFIGS, "deepspeed")


def _file_or_shipped(file: Path, name: str, folder: Path, key: str) -> Path:
    if file.is_file():
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
