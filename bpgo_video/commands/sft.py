"""Warm-start a video diffusion policy by flow matching on captioned videos; `train` for recipes of kind sft only.

    bpgo-video videos build --input VIDEOS --output runs/clips --policy FOLDER --num-frames 81 ...
    bpgo-video sft --config my_sft.yaml --run.dir runs/warm --ranks 8

The trained model is in RUN/export. Start BPGO from it with --policy.folder runs/warm/export.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bpgo_video.cli import help_of, launch_if_ranks
from bpgo_video.commands.train import train
from bpgo_video.config.command_line import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    words = launch_if_ranks("bpgo_video.commands.sft", arguments)
    train(load_recipe(words, kind="sft", **help_of("sft", __doc__, ranks=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
