"""Make prompt shards for training from prompt files, and inspect them.

    bpgo-video prompts build --input prompts.txt --output shards --policy FOLDER
    bpgo-video prompts build ... --ranks 8 --device cuda
    bpgo-video prompts build ... --height 720 --width 1280    where the text encoder reads images, too
    bpgo-video prompts inspect shards
    bpgo-video prompts verify shards
    bpgo-video prompts stats shards

Embeddings are computed once, by the policy's own text encoder; no file in a shard is a pickle. A build that was
interrupted continues when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bpgo_video.cli import add_ranks, help_of, positive, run_command
from bpgo_video.data.build import Build, BuildSettings, Content
from bpgo_video.data.fingerprint import encoder_stamp
from bpgo_video.data.image_texts import image_text_content, require_images
from bpgo_video.data.prompt_plan import Plan, make_plan
from bpgo_video.data.shard_commands import add_build_arguments, encoders, rank_and_bar, run_build, shard_parser
from bpgo_video.data.shards import PromptShards
from bpgo_video.paths import resolve_folder

MEDIA = (f"{'media':<11}", lambda record: ",".join(record.media))


def build(args: argparse.Namespace) -> None:
    """Check every line first: a mistake in the last one costs seconds, not the encoding of all before it."""
    _, _, bar = rank_and_bar()
    plan = make_plan(args.input, args.split, args.max_characters, args.on_error, bar)
    folder = resolve_folder(args.policy)
    policy = encoders(args, ("text_encoder",))
    content = content_of(args, plan, folder, policy)
    stamp = encoder_stamp(folder, args.max_sequence_length)
    settings = BuildSettings(args.negative_prompt, args.shard_size, args.batch_size, args.dtype)
    run_build(Build(plan, args.output, lambda texts: policy().encode(texts), stamp, settings, content))


def content_of(args: argparse.Namespace, plan: Plan, folder: Path, policy: Callable[[], Any]) -> Content:
    """What records hold: texts, or texts that see their images."""
    from bpgo_video.policies import family  # heavy imports only once the input is known to be good

    size, sees = (args.height, args.width), family(folder, args.family).texts_see_images
    if sees and None in size:
        raise ValueError(
            "this policy's text encoder reads the image with the text: give --height and --width of the videos that "
            "will be made, the recipe's video.height and video.width"
        )
    if not sees and size != (None, None):
        raise ValueError(f"--height and --width are {size}, but this policy encodes texts alone: leave them out")
    if not sees:
        return Content()
    require_images(plan)
    return image_text_content(policy, folder, size)


def priors(shards: PromptShards) -> list[str]:
    found = sorted(path.stem for path in (shards.directory / "priors").glob("*.json"))
    return [f"priors      {', '.join(found) or 'none; bpgo-video priors makes them'}"]


def parser(script: str | None = None) -> argparse.ArgumentParser:
    top, commands = shard_parser(help_of("prompts", __doc__, script), MEDIA, priors)
    top.set_defaults(module="bpgo_video.commands.prompts")
    command = commands.add_parser("build", help="encode the prompts of files and write shards")
    command.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help='.txt, one prompt a line; .jsonl or .csv with "prompt" and any of negative_prompt, id, split, tags, '
        "image, video; or VBench's .json",
    )
    for name in ("--height", "--width"):
        text = "pixels of the videos, where the text encoder reads the image with the text (HunyuanVideo I2V)"
        command.add_argument(name, type=positive, metavar="N", help=text)
    negative = "for prompts without one of their own"
    add_build_arguments(command, "prompts", "prompts", negative, shard_size=1000, batch_size=32)
    add_ranks(command)
    command.set_defaults(run=build)
    return top


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    return run_command(parser(script), arguments)


if __name__ == "__main__":
    sys.exit(main())
