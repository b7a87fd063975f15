"""Make prompt shards for training from prompt files, and inspect them.

    bpgo-video prompts build --input prompts.txt --output shards --policy FOLDER --holdout 0.1
    bpgo-video prompts build --input org/name:train --text-column caption ...    from the Hugging Face hub
    bpgo-video prompts build ... --ranks 8 --device cuda
    bpgo-video prompts build ... --height 720 --width 1280    if the text encoder also reads images
    bpgo-video prompts inspect shards
    bpgo-video prompts verify shards
    bpgo-video prompts stats shards

The policy's own text encoder computes the embeddings once; no file in a shard is a pickle. If a build was interrupted,
the same command continues it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from bpgo_video.cli import Parser, add_ranks, device, help_of, positive, run_command, share, show_loading_once, typed
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.data import FIELDS, HELDOUT, MAX_CHARACTERS, SKIPPED, column_flag
from bpgo_video.files import resolve_folder

HOLDOUT = 0.1  # share of prompts
CONTENT = {"prompts": "prompts", "clips": "videos"}  # content of shards -> the subcommand that makes them
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def build(args: argparse.Namespace) -> None:
    """Check every line before a model is loaded, then encode. A mistake in the last line costs seconds."""
    plan = plan_of(args, holdout=HOLDOUT)
    policy = loader(args, ("text_encoder",))
    run_build(args, plan, policy, content_of(args, plan, policy))


def plan_of(args: argparse.Namespace, holdout: float, **reading: Any) -> Any:
    """The Plan of a build.

    Args:
        holdout: share that is held out if neither a flag nor the input says anything about splits.
        reading: further arguments of `make_plan`.

    Raises:
        PromptFileError: a share to hold out is given, and the input has splits of its own.
    """
    from bpgo_video.data.prompt_formats import PromptFileError
    from bpgo_video.data.prompt_plan import make_plan

    part = args.holdout if args.holdout is not None else 0.0 if args.split else holdout
    chosen = {name: getattr(args, f"{name}_column") for name in FIELDS}
    columns = {name: (column,) if column else () for name, column in chosen.items() if column is not None}
    reading |= {"columns": columns, "max_characters": args.max_characters, "show_progress": RANK == 0}
    plan = make_plan(args.input, args.split or "train", args.on_error, part, **reading)
    if args.holdout and plan.has_splits:
        raise PromptFileError(
            f"--holdout is {args.holdout}, but the input names splits; leave out --holdout, or ignore them: "
            f"{column_flag('split')} ''"
        )
    if plan.unused and RANK == 0:
        print(f"not read: the columns {', '.join(sorted(plan.unused))}; --help lists the flags that name columns")
    return plan


def content_of(args: argparse.Namespace, plan: Any, policy: Callable[[], Any]) -> Any:
    """The Content of the shards: plain texts, or texts encoded with their images, as the policy's family requires."""
    from bpgo_video.data.writer import Content, image_text_content, require_images
    from bpgo_video.policies import family

    folder, size = resolve_folder(args.policy), (args.height, args.width)
    if not family(folder, args.family).texts_see_images:
        if size != (None, None):
            raise ConfigError(f"--height and --width are {size}, but this policy encodes texts alone: leave them out")
        return Content()
    if None in size:
        raise ConfigError(
            "this policy's text encoder reads the image with the text: give --height and --width of the videos that "
            "will be made, the recipe's video.height and video.width"
        )
    require_images(plan)
    return image_text_content(policy, folder, size)


def loader(args: argparse.Namespace, components: Sequence[str]) -> Callable[[], Any]:
    """A function that loads the policy with these components at its first call."""

    @cache
    def policy() -> Any:
        import torch  # heavy imports, after the input was checked

        from bpgo_video.policies import load_policy

        show_loading_once()
        return load_policy(
            args.policy,
            components=tuple(components),
            max_sequence_length=args.max_sequence_length,
            dtype=getattr(torch, args.dtype),
            device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if args.device == "cuda" else args.device,
            name=args.family,
        )

    return policy


def run_build(args: argparse.Namespace, plan: Any, policy: Callable[[], Any], content: Any) -> None:
    """Write this rank's shards, and print the state of the folder."""
    from bpgo_video.data.reader import PromptShards
    from bpgo_video.data.records import encoder_stamp
    from bpgo_video.data.writer import Build

    stamp = encoder_stamp(resolve_folder(args.policy), args.max_sequence_length)
    settings = {name: getattr(args, name) for name in ("negative_prompt", "shard_size", "batch_size", "dtype")}
    again = typed(CONTENT[content.name], [*args.words, "--overwrite"])
    more = {"content": content, "overwrite": args.overwrite, "again": again}
    job = Build(plan, args.output, lambda texts: policy().encode(texts), stamp, **settings, **more)
    if not job.run(RANK, WORLD_SIZE, show_progress=RANK == 0):
        print(f"{args.output}: rank {RANK} is done; the last rank to end completes the folder", flush=True)
        return
    index = PromptShards(args.output).index
    skipped = index["build"]["skipped"]
    note = f"; {skipped} skipped: see {args.output / SKIPPED}" if skipped else ""
    print(f"{args.output}: {index['count']} {content.name}: {_counts(index['splits'])}{note}", flush=True)


def open_shards(args: argparse.Namespace) -> Any:
    """The PromptShards that the arguments name."""
    from bpgo_video.data.reader import PromptShards

    shards = PromptShards(args.directory)
    if args.clips:
        shards.require_clips()
    return shards


def inspect(args: argparse.Namespace) -> None:
    shards = open_shards(args)
    title = f"{'video':<30} {'start':>7}" if args.clips else f"{'media':<11}"
    print(f"{'id':>19}  {'split':<9} {'tags':<16} {title} prompt | negative prompt of its own")
    for record in islice(shards.records(args.split), args.limit):
        source = ",".join(record.media)
        if args.clips:
            source = f"{record.info['video'][-30:]:<30} {record.info['start']:>7.2f}"
        texts = [" ".join(text.split()) for text in (record.prompt, record.negative_prompt) if text is not None]
        tags = ",".join(record.tags)
        print(f"{record.id:>19}  {record.split:<9} {tags:<16} {source:<{len(title)}} {' | '.join(texts)}")


def verify(args: argparse.Namespace) -> None:
    shards = open_shards(args)
    shards.verify(show_progress=True)
    print(f"{args.directory}: {len(shards)} prompts in {len(shards.index['shards'])} shards are intact")


def stats(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from bpgo_video.data.statistics import THRESHOLD, prompt_statistics

    shards = open_shards(args)
    found = prompt_statistics(iter(tqdm(shards.headers(), total=len(shards), desc="records", unit="record")))
    shortest, median, longest = found.characters
    own, distinct = found.negatives
    print(f"prompts     {len(shards)} in {len(shards.index['shards'])} shards")
    print(f"splits      {_counts(shards.splits)}")
    print(f"tags        {_counts(found.tags)}")
    print(f"media       {_counts(found.media)}")
    print(f"negative    {shards.negative_prompt!r}; {own} prompts have one of their own, {distinct} different ones")
    print(f"characters  {shortest} to {longest}, median {median}")
    print(f"repeated    {found.repeated} prompts have the text of another")
    near = sum(map(len, found.near))
    print(f"near        {near} prompts in {len(found.near)} groups share {THRESHOLD:.0%} of their words or more")
    print(f"leaks       {found.equal_leaks} texts are in two splits, {len(found.leaks)} groups of near prompts are")
    for group in found.leaks[: args.limit]:
        leaking = {record.split: record for record in map(shards.record, group)}
        print("            " + " ~ ".join(f"{split}: {record.prompt!r}" for split, record in leaking.items()))
    print(f"encoder     {shards.policy.name} {shards.policy.fingerprint}, {shards.policy.max_sequence_length} tokens")
    for name, layout in {**shards.index["conditioning"], **shards.clip}.items():
        print(f"tensor      {name} {layout['dtype']} {layout['shape']}")
    if args.clips:
        frames, fps = shards.video["num_frames"], shards.video["fps"]
        sources = len({header["info"]["video"] for header in shards.headers()})
        print(f"clip        {frames} frames of {shards.video['height']} x {shards.video['width']} at {fps:g} a second")
        print(f"length      {len(shards) * frames / fps:,.0f} s in all, of {sources} videos")
    else:
        priors = sorted(path.stem for path in (shards.directory / "priors").glob("*.json"))
        print(f"priors      {', '.join(priors) or 'none; bpgo-video priors makes them'}")


def _counts(table: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in table.items()) or "none"


def shard_parser(shown: Mapping[str, Any], clips: bool) -> tuple[argparse.ArgumentParser, Any]:
    """The command line with inspect, verify and stats, and the action to which `build` is added."""
    top = Parser(**shown, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for run, text in (
        (inspect, "print records as a table"),
        (verify, "read every record, compare every hash, decode all media; exit code 0 only when all is intact"),
        (stats, "count splits, tags, lengths, equal and nearly equal prompts, and leaks between splits"),
    ):
        command = commands.add_parser(run.__name__, help=text, description=text)
        command.add_argument("directory", metavar="SHARDS", help="folder, glob, brace range or URL of shards")
        command.set_defaults(run=run, clips=clips)
        if run is inspect:
            command.add_argument("--split", help="only this split")
        if run is not verify:
            command.add_argument("--limit", type=positive, default=20, help="records to print (%(default)s)")
    return top, commands


def add_columns(command: argparse.ArgumentParser) -> None:
    """The options that name columns."""
    group = command.add_argument_group("columns of tables, .jsonl lines and data sets; '' reads none")
    for name, (_, guesses) in FIELDS.items():
        text = f"({', or else '.join(guesses)})"
        group.add_argument(column_flag(name), dest=f"{name}_column", metavar="NAME", help=text)


def add_build_arguments(
    command: argparse.ArgumentParser,
    what: str,
    texts: str,
    negative: str,
    holdout: float,
    shard_size: int,
    batch_size: int,
) -> None:
    """The options of every build.

    Args:
        what: shards hold, such as "prompts".
        texts: are encoded, such as "captions".
        negative: which of them --negative-prompt is for.
        holdout: default share that is held out.
    """
    add = command.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="new folder, or that of an interrupted build")
    text = "replace shards of other input or settings in DIR, which stay whole until the new ones are complete"
    add("--overwrite", action="store_true", help=text)
    add("--policy", required=True, metavar="FOLDER", help="diffusers pipeline folder, hub id or package:module/folder")
    add("--family", metavar="NAME", help="the recipe's policy.family, if it names one")
    add("--split", help=f"split of {what} that do not name their own and are not held out (train)")
    add(
        "--holdout",
        type=share,
        metavar="SHARE",
        help=f"share of the {what} that get the split {HELDOUT!r}, which training evaluates on, by a hash of the text; "
        f"nearly equal texts stay together ({holdout:g}; 0 if --split is given or the input names splits)",
    )
    add_columns(command)
    add("--negative-prompt", default="", metavar="TEXT", help=f"{negative} (empty)")
    add(
        "--max-sequence-length",
        type=positive,
        default=512,
        metavar="N",
        help="text tokens; must equal the recipe's policy.max_sequence_length (%(default)s, Wan's own; "
        "128 LTX-Video, 226 CogVideoX, 256 HunyuanVideo and Mochi)",
    )
    add(
        "--max-characters",
        type=positive,
        default=MAX_CHARACTERS,
        metavar="N",
        help=f"longer {texts} are mistakes: the encoder would drop what exceeds its tokens (%(default)s)",
    )
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help=f"what to do about a {what.removesuffix('s')} that cannot be used: end the build, or leave it out and "
        f"list it in {SKIPPED} (%(default)s)",
    )
    add("--shard-size", type=positive, default=shard_size, metavar="N", help=f"{what} in a shard (%(default)s)")
    add("--batch-size", type=positive, default=batch_size, metavar="N", help="texts encoded at once (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of encoder and tensors (%(default)s)")
    add("--device", type=device, default="cpu", help="where the encoder runs: cpu, cuda (the rank's own) (%(default)s)")
    add_ranks(command)


def parser(script: str | None = None) -> argparse.ArgumentParser:
    top, commands = shard_parser(help_of("prompts", __doc__, script), clips=False)
    top.set_defaults(ranked="prompts")
    command = commands.add_parser("build", help="encode the prompts of files and write shards")
    command.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE|FOLDER|ID",
        help=".txt, one prompt a line; .jsonl, .csv, .tsv or .parquet with the columns below; VBench's .json; a folder "
        "with such a metadata file, or that `datasets` saved; or a data set of the Hugging Face hub: "
        "OWNER/NAME[/CONFIG][:SPLIT]",
    )
    for name in ("--height", "--width"):
        text = "pixels of the videos, if the text encoder reads the image with the text (HunyuanVideo I2V)"
        command.add_argument(name, type=positive, metavar="N", help=text)
    negative = "for prompts without one of their own"
    add_build_arguments(command, "prompts", "prompts", negative, HOLDOUT, shard_size=1000, batch_size=32)
    command.set_defaults(run=build)
    return top


def main(words: Sequence[str], script: str | None = None) -> int:
    return run_command(parser(script), words)
