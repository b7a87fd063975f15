"""Make prompt shards for training from prompt files, and look at them.

    python tools/make_prompt_shards.py build --input prompts.txt --output shards --policy FOLDER
    torchrun --nproc-per-node 8 tools/make_prompt_shards.py build ... --device cuda
    python tools/make_prompt_shards.py build ... --height 720 --width 1280    where the text encoder reads images, too
    python tools/make_prompt_shards.py inspect shards
    python tools/make_prompt_shards.py verify shards
    python tools/make_prompt_shards.py stats shards

Embeddings are computed once, by the policy's own text encoder; no file in a shard is a pickle. A build that was
interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bpgo_video.cli import positive, run_command
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
    return [f"priors      {', '.join(found) or 'none; tools/estimate_priors.py makes them'}"]


def parser() -> argparse.ArgumentParser:
    top, commands = shard_parser(__doc__, MEDIA, priors)
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
    negative = "where none is given beside a prompt"
    add_build_arguments(command, "prompts", "prompts", negative, shard_size=1000, batch_size=32)
    command.set_defaults(run=build)
    return top


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
