"""Convert a training checkpoint to files for inference, and publish them.

    bpgo-video convert --checkpoint runs/demo --output wan-bpgo --format diffusers --verify
    bpgo-video convert --checkpoint runs/demo/checkpoints/step-000050 --output adapters --format lora
    bpgo-video convert --checkpoint runs/demo --output comfyui --format comfyui --merged --dtype bfloat16
    bpgo-video convert --checkpoint runs/demo --output adapters --format lora --push-to-hub ORG/NAME --private

Joins the parts of any ZeRO stage and number of ranks on one CPU, a tensor at a time. Checks every file of a checkpoint
before it unpickles one. Prints the new folder, the checkpoint it comes from, and the address on the hub if it was
uploaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bpgo_video.cli import Parser, above_zero, help_of, run_command
from bpgo_video.config.bpgo import ConfigError

FORMATS = {  # rows of bpgo_video.inference.conversion.FORMATS
    "diffusers": "a pipeline folder, adapters merged",
    "lora": "adapters for load_lora_weights",
    "comfyui": "adapters for ComfyUI; with --merged, or for a run without adapters, whole transformers",
    "universal": "DeepSpeed's checkpoint for any number of ranks, with the optimizer's state",
}


def run(args: argparse.Namespace) -> None:
    from bpgo_video.inference.conversion import Conversion, convert
    from bpgo_video.inference.hub import Repository
    from bpgo_video.inference.run_weights import DTYPES, find_checkpoint

    if args.push_to_hub is None and (args.private or args.revision):
        raise ConfigError("--private and --revision are of the upload; add --push-to-hub ORG/NAME, or remove them")
    checkpoint = find_checkpoint(args.checkpoint)
    job = Conversion(
        checkpoint,
        args.weights,
        args.output,
        DTYPES[args.dtype],
        args.transformer_only,
        args.merged,
        int(args.shard_gigabytes * 1e9),
        args.push_to_hub and Repository(args.push_to_hub, args.private, args.revision),
    )
    address = convert(job, args.format, args.verify)
    verified = ", verified" if args.verify else ""
    print(f"{args.output}: {checkpoint.folder.name} of {checkpoint.folder.parents[1]}{verified}")
    if address is not None:
        print(address)


def main(words: Sequence[str], script: str | None = None) -> int:
    """0 only if everything was written and, with --verify, compared."""
    parser = Parser(**help_of("convert", __doc__, script))
    add = parser.add_argument
    where = "RUN/checkpoints/step-XXXXXX, or RUN for its newest one"
    add("--checkpoint", type=Path, required=True, metavar="DIR", help=where)
    add("--output", type=Path, required=True, metavar="DIR", help="new folder; an existing one is never overwritten")
    purposes = "; ".join(f"{name}: {purpose}" for name, purpose in FORMATS.items())
    add("--format", choices=tuple(FORMATS), required=True, help=purposes)
    weights = "raw: the optimizer's; ema: their average, if the run kept one (%(default)s)"
    add("--weights", choices=("raw", "ema"), default="raw", help=weights)
    dtypes = "of the trained weights, except those that diffusers keeps in fp32 (%(default)s)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtypes)
    add("--transformer-only", action="store_true", help="diffusers: the transformer's folder, not the whole pipeline")
    add("--merged", action="store_true", help="comfyui: the whole transformer, adapters merged, as one file")
    size = "diffusers: size limit of a weight file (%(default)s)"
    add("--shard-gigabytes", type=above_zero, default=5.0, metavar="GB", help=size)
    add("--verify", action="store_true", help="load the result; compare every tensor and a forward pass")
    add("--push-to-hub", metavar="ORG/NAME", help="upload the folder to this repository, which is created if missing")
    add("--private", action="store_true", help="create a private repository, and refuse a public one")
    add("--revision", metavar="BRANCH", help="branch of the upload, created if missing (main)")
    parser.set_defaults(run=run)
    return run_command(parser, words)
