"""Warm-start a video diffusion policy by flow matching on videos with captions: `train` for recipes of kind sft alone.

    bpgo-video videos build --input VIDEOS --output runs/clips --policy FOLDER --num-frames 81 ...
    bpgo-video sft --config my_sft.yaml --run.dir runs/warm --ranks 8

Refuses a recipe of another kind before it reads a flag. The trained model, RUN/export, is what a BPGO recipe starts
from: --policy.folder runs/warm/export.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bpgo_video.cli import on_ranks, shown_as
from bpgo_video.commands.train import train
from bpgo_video.config.command_line import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    words = on_ranks("bpgo_video.commands.sft", arguments)
    train(load_recipe(words, kind="sft", **shown_as("sft", __doc__, ranks=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
