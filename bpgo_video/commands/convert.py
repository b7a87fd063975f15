"""Convert a training checkpoint to what inference tools read.

    bpgo-video convert --checkpoint runs/demo --output wan-bpgo --format diffusers --verify
    bpgo-video convert --checkpoint runs/demo/checkpoints/step-000050 --output adapters --format lora

Joins ZeRO's parts of any stage and number of ranks on one CPU, a tensor at a time, without a process group; nothing in
a checkpoint is unpickled before it has been inspected.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bpgo_video.cli import Parser, above_zero, shown_as, tell
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed.zero_files import CheckpointError
from bpgo_video.inference.conversion import FORMATS, Conversion, convert
from bpgo_video.inference.pipeline_folder import SHARD_BYTES
from bpgo_video.inference.run_weights import DTYPES, WEIGHTS, find_source


def parser(script: str | None = None) -> argparse.ArgumentParser:
    top = Parser(**shown_as("convert", __doc__, script), formatter_class=argparse.RawDescriptionHelpFormatter)
    add = top.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="RUN/checkpoints/step-XXXXXX, or RUN for its newest; ZeRO of any stage, from any number of ranks",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="new folder; an existing one is refused")
    purposes = "; ".join(f"{name}: {form.purpose}" for name, form in FORMATS.items())
    add("--format", choices=tuple(FORMATS), required=True, help=purposes)
    weights = "raw: as the optimiser holds them; ema: their average, where the run kept one (%(default)s)"
    add("--weights", choices=tuple(WEIGHTS), default="raw", help=weights)
    dtypes = "of the trained weights, except those that diffusers keeps in fp32 (%(default)s)"
    add("--dtype", choices=tuple(DTYPES), default="float32", help=dtypes)
    add("--transformer-only", action="store_true", help="diffusers: the transformer's folder, not the whole pipeline")
    add("--merged", action="store_true", help="comfyui: the whole transformer, adapters merged, as one file")
    add(
        "--shard-gigabytes",
        type=above_zero,
        default=SHARD_BYTES / 1e9,
        help="size of a weight file at most (%(default)s)",
    )
    add("--verify", action="store_true", help="load the result; compare every tensor, and a forward pass")
    return top


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    """0 only when everything was written and, with --verify, compared."""
    args = parser(script).parse_args(arguments)
    try:
        source = find_source(args.checkpoint)
        shard_bytes = int(args.shard_gigabytes * 1e9)
        dtype, whole = DTYPES[args.dtype], args.transformer_only
        job = Conversion(source, args.weights, args.output, dtype, whole, args.merged, shard_bytes)
        convert(job, args.format, args.verify)
    except (CheckpointError, ConfigError, OSError, ValueError) as error:  # wrong input; else keep the traceback
        return tell(error)
    print(f"{args.output}: {source.folder.name} of {source.folder.parents[1]}{', verified' if args.verify else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
