r"""Make video shards for a warm start from videos with captions, and inspect them.

    bpgo-video videos build --input FOLDER --output shards --policy FOLDER \
        --num-frames 81 --height 480 --width 832 --fps 16
    bpgo-video videos build ... --ranks 8 --device cuda --dtype bfloat16
    bpgo-video videos inspect shards
    bpgo-video videos verify shards
    bpgo-video videos stats shards

Latents and embeddings are computed once, by the policy's own VAE and text encoder; for image-to-video what the first
frame of a clip adds, too. No file in a shard is a pickle. A build that was interrupted continues when the same command
is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bpgo_video.cli import above_zero, add_ranks, help_of, positive, run_command
from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.data.build import Build, BuildSettings
from bpgo_video.data.clips import Cut
from bpgo_video.data.fingerprint import encoder_stamp
from bpgo_video.data.prompt_records import PromptRecord
from bpgo_video.data.shard_commands import add_build_arguments, encoders, rank_and_bar, run_build, shard_parser
from bpgo_video.data.shards import PromptShards
from bpgo_video.data.video_lists import plan_clips
from bpgo_video.paths import resolve_folder


def build(args: argparse.Namespace) -> None:
    """Read every caption and every video's header first: only what a video shows is looked at later."""
    _, _, bar = rank_and_bar()
    video = VideoConfig(args.num_frames, args.height, args.width, args.fps)
    cut = Cut(video, args.clips_per_video, args.num_frames / args.fps if args.stride is None else args.stride)
    plan = plan_clips(args.input, cut, args.split, args.on_error, args.max_characters, bar)

    import torch  # heavy imports only once the input is known to be good

    from bpgo_video.data.clip_build import clip_content

    nothing_loaded = encoders(args, ())()
    nothing_loaded.latent_shape(video)  # a size that the family cannot make ends the build here
    policy, folder = encoders(args, ("text_encoder", "vae", "image_encoder")), resolve_folder(args.policy)
    content = clip_content(policy, nothing_loaded, folder, video, getattr(torch, args.dtype))
    stamp = encoder_stamp(folder, args.max_sequence_length)
    settings = BuildSettings(args.negative_prompt, args.shard_size, args.batch_size, args.dtype)
    run_build(Build(plan, args.output, lambda texts: policy().encode(texts), stamp, settings, content))


def with_clips(source: str) -> PromptShards:
    shards = PromptShards(source)
    shards.require_clips()
    return shards


def clip_of(record: PromptRecord) -> str:
    return f"{record.info['video'][-30:]:<30} {record.info['start']:>7.2f}"


def clips(shards: PromptShards) -> list[str]:
    frames, fps = shards.video["num_frames"], shards.video["fps"]
    sources = len({header["info"]["video"] for header in shards.headers()})
    return [
        f"clip        {frames} frames of {shards.video['height']} x {shards.video['width']} at {fps:g} a second",
        f"length      {len(shards) * frames / fps:,.0f} s in all, of {sources} videos",
    ]


def parser(script: str | None = None) -> argparse.ArgumentParser:
    top, commands = shard_parser(
        help_of("videos", __doc__, script), (f"{'video':<30} {'start':>7}", clip_of), clips, with_clips
    )
    top.set_defaults(module="bpgo_video.commands.videos")
    command = commands.add_parser("build", help="decode, cut and encode videos with captions, and write shards")
    add = command.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FOLDER|FILE",
        help='a folder of videos, each with a caption in a .txt next to it; or a .jsonl with "video", "caption" and '
        "any of split, tags, info",
    )
    for name, text in (("--num-frames", "frames of a clip"), ("--height", "pixels"), ("--width", "pixels")):
        add(name, type=positive, required=True, metavar="N", help=text)
    add(
        "--fps",
        type=above_zero,
        required=True,
        metavar="F",
        help="frames a second of a clip; of a video the nearest in time",
    )
    add("--clips-per-video", type=positive, default=1, metavar="N", help="at most; as many as fit (%(default)s)")
    add("--stride", type=above_zero, metavar="S", help="seconds between the starts of clips (a clip's length)")
    add_build_arguments(command, "clips", "captions", "of all clips", shard_size=256, batch_size=16)
    add_ranks(command)
    command.set_defaults(run=build)
    return top


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    return run_command(parser(script), arguments)


if __name__ == "__main__":
    sys.exit(main())
