"""Post-train a video diffusion policy: with BPGO on rewards, or by flow matching on videos, as the recipe says.

    bpgo-video train --config tiny_wan_bpgo --ranks 2
    bpgo-video train --config my_recipe.yaml --run.dir runs/mine --run.resume auto
    deepspeed --hostfile HOSTS --module bpgo_video.train --config my_recipe.yaml

Writes RUN/metrics.jsonl as it goes, RUN/report.html, samples and the trained model, RUN/export. A run that was stopped
continues with --run.resume auto. Several nodes: docs/multi_node.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from bpgo_video.cli import on_ranks, shown_as
from bpgo_video.config.command_line import load_recipe
from bpgo_video.config.sft import Recipe
from bpgo_video.training import rl, sft
from bpgo_video.training.loop import launched

TRAINERS: dict[str, Callable[[Any], dict[str, Any] | None]] = {"bpgo": rl.train, "sft": sft.train}


def train(config: Recipe) -> None:
    with launched():
        TRAINERS[config.recipe](config)


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    words = on_ranks("bpgo_video.commands.train", arguments)
    train(load_recipe(words, **shown_as("train", __doc__, script, ranks=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
