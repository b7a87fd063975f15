"""What is trained? A policy's transformers as one module, so that one engine shards, steps and saves them together."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from bpgo_video.config.bpgo import ConfigError


class Transformers(nn.ModuleDict):
    """The transformers of a pipeline by their names in it. A forward names the one that computes.

    Under ZeRO-3 the others stay sharded meanwhile; so all ranks must call the same one at the same time.
    """

    def forward(self, name: str, **inputs: Any) -> Any:
        return self[name](**inputs)


def transformer_names(folder: Path) -> tuple[str, ...]:
    """The transformers that a pipeline folder has, by its model_index.json: one, or Wan 2.2's two."""
    index = read_index(folder)
    return tuple(name for name, part in sorted(index.items()) if name.startswith("transformer") and part[0])


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's parts and settings by their names in it."""
    return dict(json.loads((folder / "model_index.json").read_text("utf-8")))


def trained_names(folder: Path, asked: Collection[str] = ()) -> tuple[str, ...]:
    """Which of them are trained: those asked for, or all.

    Raises:
        ConfigError: the folder has no transformer of a name.
    """
    names = transformer_names(folder)
    if unknown := sorted(set(asked) - set(names)):
        raise ConfigError(f"policy.trained names {unknown}, but {folder} has {list(names)}; empty trains all")
    return tuple(name for name in names if name in asked) or names


def blocks_of(module: nn.Module, names: Iterable[str]) -> tuple[type[nn.Module], ...]:
    """The classes of these names among a module's parts.

    Raises:
        ValueError: it has none of them.
    """
    found = {type(part).__name__: type(part) for part in module.modules()}
    classes = tuple(found[name] for name in names if name in found)
    if not classes:
        raise ValueError(f"{type(module).__name__} has no block of {list(names)}; a policy's block_names names some")
    return classes
