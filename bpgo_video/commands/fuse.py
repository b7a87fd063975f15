"""Fuse adapters, such as those of a distilled model, into a pipeline folder, to train from there.

    bpgo-video fuse --policy Wan-AI/Wan2.1-T2V-14B-Diffusers --lora distill.safetensors --output runs/wan21-14b-4step
    bpgo-video fuse --policy A14B --lora high.safetensors --lora-2 low.safetensors --output runs/wan22-a14b-4step

Reads the layouts of adapters that diffusers reads, ComfyUI's among them, and fuses them as diffusers does. The new
folder is a pipeline like any other: name it in a recipe's policy.folder. fused.json in it says what was fused. A whole
transformer is in memory (14B: 57 GB in fp32, 29 GB with --dtype bfloat16).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bpgo_video.cli import Parser, above_zero, help_of, run_command
from bpgo_video.config.bpgo import ConfigError


def run(args: argparse.Namespace) -> None:
    from bpgo_video.inference.fusing import Fusion, fuse
    from bpgo_video.inference.run_weights import DTYPES

    files = {"transformer": args.lora, "transformer_2": args.lora_2}
    adapters = {name: file for name, file in files.items() if file is not None}
    if not adapters:
        raise ConfigError("there are no adapters to fuse; give --lora FILE, or --lora-2 for Wan 2.2's second expert")
    fuse(Fusion(args.policy, adapters, args.scale, DTYPES[args.dtype]), args.output, int(args.shard_gigabytes * 1e9))
    print(args.output)


def main(words: Sequence[str], script: str | None = None) -> int:
    """0 only if the folder was written."""
    parser = Parser(**help_of("fuse", __doc__, script))
    add = parser.add_argument
    add("--policy", required=True, metavar="FOLDER", help="diffusers pipeline: local folder, hub id, or package:...")
    add("--lora", type=Path, metavar="FILE", help="adapters of the transformer (Wan 2.2: of the high-noise expert)")
    add("--lora-2", type=Path, metavar="FILE", help="adapters of Wan 2.2's low-noise expert, transformer_2")
    add("--output", type=Path, required=True, metavar="DIR", help="new folder; an existing one is never overwritten")
    add("--scale", type=above_zero, default=1.0, help="factor of what the adapters add (%(default)s)")
    dtypes = "of the fused weights, except those that diffusers keeps in fp32 (%(default)s)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtypes)
    size = "size limit of a weight file (%(default)s)"
    add("--shard-gigabytes", type=above_zero, default=5.0, metavar="GB", help=size)
    parser.set_defaults(run=run)
    return run_command(parser, words)
