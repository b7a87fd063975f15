"""Which run does a command line ask for? What the recipe's `recipe` names, from a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bpgo_video.config.command_line import load_recipe
from bpgo_video.training import rl, sft
from bpgo_video.training.launch import launched

TRAINERS: dict[str, Callable[[Any], dict[str, Any] | None]] = {"bpgo": rl.train, "sft": sft.train}


def main(argv: Sequence[str] | None = None, description: str | None = None) -> None:
    """The command line of pipelines/train_video.py, described by its docstring."""
    config = load_recipe(argv, description)
    with launched():
        TRAINERS[config.recipe](config)
