"""Convert a training checkpoint to files for inference.

    bpgo-video convert --checkpoint runs/demo --output wan-bpgo --format diffusers --verify
    bpgo-video convert --checkpoint runs/demo/checkpoints/step-000050 --output adapters --format lora
    bpgo-video convert --checkpoint runs/demo --output comfyui --format comfyui --merged --dtype bfloat16

Joins the parts of any ZeRO stage and number of ranks on one CPU, a tensor at a time. Checks every file of a checkpoint
before it unpickles one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bpgo_video.cli import Parser, above_zero, help_of, run_command
from bpgo_video.distributed.zero_files import CheckpointError
from bpgo_video.inference.conversion import FORMATS, Conversion, convert
from bpgo_video.inference.model_files import SHARD_BYTES
from bpgo_video.inference.run_weights import DTYPES, WEIGHTS, find_checkpoint


def run(args: argparse.Namespace) -> None:
    checkpoint = find_checkpoint(args.checkpoint)
    job = Conversion(
        checkpoint,
        args.weights,
        args.output,
        DTYPES[args.dtype],
        args.transformer_only,
        args.merged,
        int(args.shard_gigabytes * 1e9),
    )
    convert(job, args.format, args.verify)
    verified = ", verified" if args.verify else ""
    print(f"{args.output}: {checkpoint.folder.name} of {checkpoint.folder.parents[1]}{verified}")


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    """0 only if everything was written and, with --verify, compared."""
    parser = Parser(**help_of("convert", __doc__, script))
    add = parser.add_argument
    where = "RUN/checkpoints/step-XXXXXX, or RUN for its newest one"
    add("--checkpoint", type=Path, required=True, metavar="DIR", help=where)
    add("--output", type=Path, required=True, metavar="DIR", help="new folder; an existing one is never overwritten")
    purposes = "; ".join(f"{name}: {form.purpose}" for name, form in FORMATS.items())
    add("--format", choices=tuple(FORMATS), required=True, help=purposes)
    weights = "raw: the optimizer's; ema: their average, if the run kept one (%(default)s)"
    add("--weights", choices=tuple(WEIGHTS), default="raw", help=weights)
    dtypes = "of the trained weights, except those that diffusers keeps in fp32 (%(default)s)"
    add("--dtype", choices=tuple(DTYPES), default="float32", help=dtypes)
    add("--transformer-only", action="store_true", help="diffusers: the transformer's folder, not the whole pipeline")
    add("--merged", action="store_true", help="comfyui: the whole transformer, adapters merged, as one file")
    size = "diffusers: size limit of a weight file (%(default)s)"
    add("--shard-gigabytes", type=above_zero, default=SHARD_BYTES / 1e9, metavar="GB", help=size)
    add("--verify", action="store_true", help="load the result; compare every tensor and a forward pass")
    parser.set_defaults(run=run)
    return run_command(parser, arguments, errors=(CheckpointError,))


if __name__ == "__main__":
    sys.exit(main())
