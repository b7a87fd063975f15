"""What the commands that make shards share: building on several ranks, and inspecting the result.

inspect   records as a table
verify    every hash; every image and video decoded
stats     counts, lengths, near duplicates, leaks
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bpgo_video.cli import Parser, device, positive, show_loading_once
from bpgo_video.data.build import SKIPPED, Build
from bpgo_video.data.near_duplicates import THRESHOLD
from bpgo_video.data.prompt_files import MAX_CHARACTERS
from bpgo_video.data.prompt_plan import Progress
from bpgo_video.data.prompt_records import PromptRecord
from bpgo_video.data.prompt_statistics import prompt_statistics
from bpgo_video.data.shards import PromptShards

Describe = Callable[[PromptRecord], str]  # what a row of the table says between tags and prompt


def rank_and_bar() -> tuple[int, int, Progress]:
    """This process's rank, how many there are, and a bar that the first one shows."""
    rank = int(os.environ.get("RANK", "0"))
    return rank, int(os.environ.get("WORLD_SIZE", "1")), partial(tqdm, disable=rank > 0)


def run_build(job: Build) -> None:
    """Write this rank's shards, and print the state of the folder."""
    rank, world_size, bar = rank_and_bar()
    if not job.run(rank, world_size, bar):
        print(f"{job.output}: rank {rank} is done; the last rank to end completes the folder", flush=True)
        return
    index = PromptShards(job.output).index
    skipped = index["build"]["skipped"]
    told = f", {skipped} skipped: see {job.output / SKIPPED}" if skipped else ""
    print(f"{job.output}: {index['count']} {job.content.name}{told}", flush=True)


def encoders(args: argparse.Namespace, components: Sequence[str]) -> Callable[[], Any]:
    """The policy with these components, loaded when it is first called for."""

    @cache
    def policy() -> Any:
        import torch  # heavy imports only once the input is known to be good

        from bpgo_video.policies import load_policy

        show_loading_once()
        local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return load_policy(
            args.policy,
            components=tuple(components),
            max_sequence_length=args.max_sequence_length,
            dtype=getattr(torch, args.dtype),
            device=local if args.device == "cuda" else args.device,
            name=args.family,
        )

    return policy


def inspect(args: argparse.Namespace) -> None:
    title, describe = args.column
    shards = args.open(args.directory)
    print(f"{'id':>19}  {'split':<9} {'tags':<16} {title} prompt | negative prompt of its own")
    for record in islice(shards.records(args.split), args.limit):
        texts = [" ".join(text.split()) for text in (record.prompt, record.negative_prompt) if text is not None]
        tags, words = ",".join(record.tags), " | ".join(texts)
        print(f"{record.id:>19}  {record.split:<9} {tags:<16} {describe(record):<{len(title)}} {words}")


def verify(args: argparse.Namespace) -> None:
    shards = args.open(args.directory)
    shards.verify(progress=partial(tqdm, desc="records", unit="record"))
    print(f"{args.directory}: {len(shards)} prompts in {len(shards.index['shards'])} shards are intact")


def stats(args: argparse.Namespace) -> None:
    shards = args.open(args.directory)
    found = prompt_statistics(iter(tqdm(shards.headers(), total=len(shards), desc="records", unit="record")))
    shortest, median, longest = found.characters
    in_groups = sum(map(len, found.near))
    print(f"prompts     {len(shards)} in {len(shards.index['shards'])} shards")
    print(f"splits      {counts(shards.splits)}")
    print(f"tags        {counts(found.tags)}")
    print(f"media       {counts(found.media)}")
    own, distinct = found.negatives
    print(f"negative    {shards.negative_prompt!r}; {own} prompts have one of their own, {distinct} different ones")
    print(f"characters  {shortest} to {longest}, median {median}")
    print(f"repeated    {found.repeated} prompts have the text of another")
    print(f"near        {in_groups} prompts in {len(found.near)} groups share {THRESHOLD:.0%} of their words or more")
    print(f"leaks       {found.equal_leaks} texts are in two splits, {len(found.leaks)} groups of near prompts are")
    for group in found.leaks[: args.limit]:
        leaking = {record.split: record for record in map(shards.record, group)}
        print("            " + " ~ ".join(f"{split}: {record.prompt!r}" for split, record in leaking.items()))
    print(f"encoder     {shards.policy.name} {shards.policy.fingerprint}, {shards.policy.max_sequence_length} tokens")
    for name, layout in {**shards.index["conditioning"], **shards.clip}.items():
        print(f"tensor      {name} {layout['dtype']} {layout['shape']}")
    for line in args.details(shards):
        print(line)


def counts(table: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in table.items()) or "none"


def shard_parser(
    shown: Mapping[str, Any],
    column: tuple[str, Describe],
    details: Callable[[PromptShards], Sequence[str]],
    open_shards: Callable[[str], PromptShards] = PromptShards,
) -> tuple[argparse.ArgumentParser, Any]:
    """The command line with inspect, verify and stats, and where `build` is to be added.

    Args:
        shown: name and description of the command.
        column: title, as wide as the column, and content of what `inspect` shows between tags and prompt.
        details: further lines of `stats`.
        open_shards: refuses those of another command.
    """
    top = Parser(**shown, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = top.add_subparsers(dest="command", required=True)
    for run, text in (
        (inspect, "print records as a table"),
        (verify, "read every record, compare every hash, decode all media; exit code 0 only when all is intact"),
        (stats, "count splits, tags, lengths, equal and nearly equal prompts, and leaks between splits"),
    ):
        command = commands.add_parser(run.__name__, help=text, description=text)
        command.add_argument("directory", metavar="SHARDS", help="folder, glob, brace range or URL of shards")
        command.set_defaults(run=run, column=column, details=details, open=open_shards)
        if run is inspect:
            command.add_argument("--split", help="only this split")
        if run is not verify:
            command.add_argument("--limit", type=positive, default=20, help="records to print (%(default)s)")
    return top, commands


def add_build_arguments(
    command: argparse.ArgumentParser, what: str, texts: str, negative: str, shard_size: int, batch_size: int
) -> None:
    """The options that every build has.

    Args:
        what: a shard holds, by name; `texts`: what is encoded of them.
        negative: when the command's negative prompt holds.
    """
    add = command.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="new folder, or that of the same build, interrupted")
    add("--policy", required=True, metavar="FOLDER", help="diffusers pipeline folder, hub id or package:module/folder")
    add("--family", metavar="NAME", help="the recipe's policy.family, where it names one")
    add("--split", default="train", help=f"split of {what} that do not name their own (%(default)s)")
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
