"""Which run does a command line ask for? What the recipe's `recipe` names, from a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bpgo_video.config.reading import load_recipe
from bpgo_video.training import sft, trainer
from bpgo_video.training.launch import launched

TRAINERS: dict[str, Callable[[Any], dict[str, Any] | None]] = {"bpgo": trainer.train, "sft": sft.train}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of pipelines/train_video.py."""
    config = load_recipe(argv, description="Post-train a video diffusion policy under DeepSpeed.")
    with launched():
        TRAINERS[config.recipe](config)
