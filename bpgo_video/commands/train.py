"""Post-train a video diffusion policy with BPGO on rewards, or with flow matching on videos, as the recipe says.

    bpgo-video train --config tiny_wan_bpgo --ranks 2
    bpgo-video train --config my_recipe.yaml --run.dir runs/mine --run.resume auto
    deepspeed --hostfile HOSTS --module bpgo_video.train --config my_recipe.yaml

Writes RUN/metrics.jsonl during training, RUN/report.html, sample videos and the trained model in RUN/export. To
continue a stopped run, add --run.resume auto. For several nodes, see docs/multi_node.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from bpgo_video.cli import help_of, launch_if_ranks
from bpgo_video.config.command_line import load_recipe
from bpgo_video.config.sft import Recipe
from bpgo_video.training import rl, sft
from bpgo_video.training.loop import launched

TRAINERS: dict[str, Callable[[Any], dict[str, Any] | None]] = {"bpgo": rl.train, "sft": sft.train}


def train(config: Recipe) -> None:
    """Run a recipe with the trainer of its kind."""
    with launched():
        TRAINERS[config.recipe](config)


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    words = launch_if_ranks("bpgo_video.commands.train", arguments)
    train(load_recipe(words, **help_of("train", __doc__, script, ranks=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
