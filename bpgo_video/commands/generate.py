"""Generate videos with a policy: a base model, an export, a checkpoint or a run, with or without LoRA adapters.

    bpgo-video generate --policy runs/demo --prompts runs/demo-prompts --output videos --seed 0 --ranks 2
    bpgo-video generate --policy runs/demo/export --num-frames 9 --height 64 --width 64 --prompts p.txt --output v ...
    bpgo-video generate --policy Wan-AI/Wan2.1-T2V-1.3B-Diffusers --lora LORA --prompts prompts.txt --output videos ...

Without --num-frames, --height and --width, a run or checkpoint makes videos of its training size; every other model
takes the defaults of its diffusers pipeline. Writes mp4 files and a manifest, and keeps existing videos. Exit code 0
only if every video is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bpgo_video.cli import help_of, launch_if_ranks, print_error, show_loading_once
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.command_line import read_settings
from bpgo_video.data.prompt_files import PromptFileError
from bpgo_video.data.records import ShardError
from bpgo_video.distributed import engine
from bpgo_video.distributed.zero_files import CheckpointError
from bpgo_video.inference.generate import ALONE, PATIENCE, generate
from bpgo_video.inference.settings import GenerationError, GenerationSettings


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    words = launch_if_ranks("bpgo_video.commands.generate", arguments)
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--local_rank", type=int)  # added by the launcher
    _, rest = launcher.parse_known_args(words)
    try:
        settings = read_settings(GenerationSettings, rest, **help_of("generate", __doc__, script, ranks=True))
        show_loading_once()
        mesh = engine.start_ranks(PATIENCE) if "RANK" in os.environ else ALONE
        manifest = generate(settings, mesh)
    except (GenerationError, ConfigError, PromptFileError, ShardError, CheckpointError, OSError) as error:
        return print_error(error)
    if mesh.is_main:
        print(manifest)
    engine.stop_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
