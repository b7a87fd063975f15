"""Generate videos with a policy: a base model, an export, a checkpoint or a run, with or without LoRA adapters.

    bpgo-video generate --policy runs/demo --prompts runs/demo-prompts --output videos --seed 0 --ranks 2
    bpgo-video generate --policy runs/demo/export --num-frames 9 --height 64 --width 64 --prompts p.txt --output v ...
    bpgo-video generate --policy Wan-AI/Wan2.1-T2V-1.3B-Diffusers --lora LORA --prompts prompts.txt --output videos ...

Without --num-frames, --height and --width, a run or checkpoint makes videos of its training size; every other model
takes the defaults of its diffusers pipeline. Writes mp4 files, or png files of single frames, and a manifest, and keeps
existing videos. Prints the path of the manifest, with exit code 0, only if every video is complete.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from bpgo_video.cli import become_launcher, help_of, print_error, show_loading_once, split_ranks
from bpgo_video.config.command_line import read_settings
from bpgo_video.config.generation import GenerationSettings


def main(words: Sequence[str], script: str | None = None) -> int:
    """0 only if every video is complete."""
    ranks, rest = split_ranks(words)
    try:
        settings = read_settings(GenerationSettings, rest, **help_of("generate", __doc__, script))
        if ranks is not None:
            become_launcher("generate", ranks, rest)
        make_videos(settings)
    except (ValueError, OSError) as error:
        return print_error(error)
    return 0


def make_videos(settings: GenerationSettings) -> None:
    """Generate this rank's share of the videos; rank 0 prints the manifest's path."""
    from bpgo_video.distributed import process_group
    from bpgo_video.inference.generate import ALONE, PATIENCE, generate

    show_loading_once()
    mesh = process_group.start_ranks(PATIENCE) if "RANK" in os.environ else ALONE
    manifest = generate(settings, mesh)
    if mesh.is_main:
        print(manifest)
    process_group.stop_ranks()
