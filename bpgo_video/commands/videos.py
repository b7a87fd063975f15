r"""Make video shards for a warm start from videos with captions, and inspect them.

    bpgo-video videos build --input FOLDER --output shards --policy FOLDER \
        --num-frames 81 --height 480 --width 832 --fps 16
    bpgo-video videos build ... --ranks 8 --device cuda --dtype bfloat16
    bpgo-video videos inspect shards
    bpgo-video videos verify shards
    bpgo-video videos stats shards

The policy's own VAE and text encoder compute latents and embeddings once, and for image-to-video also the conditioning
on a clip's first frame. No file in a shard is a pickle. If a build was interrupted, the same command continues it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bpgo_video.cli import above_zero, help_of, positive, run_command
from bpgo_video.commands.prompts import add_build_arguments, loader, plan_of, run_build, shard_parser
from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.files import resolve_folder


def build(args: argparse.Namespace) -> None:
    """Check every caption and every video's header before a model is loaded, then decode and encode."""
    from bpgo_video.data.clips import Cut, read_clips

    video = VideoConfig(args.num_frames, args.height, args.width, args.fps)
    cut = Cut(video, args.clips_per_video, args.num_frames / args.fps if args.stride is None else args.stride)
    plan = plan_of(args, holdout=0.0, read=read_clips, cut=cut)

    import torch  # after the input was checked

    from bpgo_video.data.writer import clip_content

    without_networks = loader(args, ())()
    without_networks.latent_shape(video)  # raises if the family cannot make this size
    policy = loader(args, ("text_encoder", "vae", "image_encoder"))
    folder, dtype = resolve_folder(args.policy), getattr(torch, args.dtype)
    run_build(args, plan, policy, clip_content(policy, without_networks, folder, video, dtype))


def parser(script: str | None = None) -> argparse.ArgumentParser:
    top, commands = shard_parser(help_of("videos", __doc__, script), clips=True)
    top.set_defaults(ranked="videos")
    command = commands.add_parser("build", help="decode, cut and encode videos with captions, and write shards")
    add = command.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FOLDER|FILE",
        help="a folder of videos, each with a caption in a .txt next to it; or a .jsonl, .csv, .tsv or .parquet file, "
        "also as the folder's metadata.csv and so on, with the columns below and a path in `video` or `file_name`",
    )
    for name, text in (("--num-frames", "frames of a clip"), ("--height", "pixels"), ("--width", "pixels")):
        add(name, type=positive, required=True, metavar="N", help=text)
    add(
        "--fps",
        type=above_zero,
        required=True,
        metavar="F",
        help="frames per second of a clip; each shows the video's frame nearest in time",
    )
    add("--clips-per-video", type=positive, default=1, metavar="N", help="at most; as many as fit (%(default)s)")
    add("--stride", type=above_zero, metavar="S", help="seconds between the starts of clips (a clip's length)")
    add_build_arguments(command, "clips", "captions", "of all clips", holdout=0.0, shard_size=256, batch_size=16)
    command.set_defaults(run=build)
    return top


def main(words: Sequence[str], script: str | None = None) -> int:
    return run_command(parser(script), words)
