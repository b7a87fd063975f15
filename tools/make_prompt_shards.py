"""Make prompt shards for training from prompt files, and look at them.

    python tools/make_prompt_shards.py build --input prompts.txt --output shards --policy FOLDER
    torchrun --nproc-per-node 8 tools/make_prompt_shards.py build ... --device cuda
    python tools/make_prompt_shards.py inspect shards
    python tools/make_prompt_shards.py verify shards
    python tools/make_prompt_shards.py stats shards

Embeddings are computed once, by the policy's own text encoder; no file in a shard is a pickle. A build that was
interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bpgo_video.cli import positive, run_command, show_loading_once
from bpgo_video.data.build import SKIPPED, Build, BuildSettings
from bpgo_video.data.fingerprint import encoder_stamp
from bpgo_video.data.near_duplicates import THRESHOLD
from bpgo_video.data.prompt_files import MAX_CHARACTERS
from bpgo_video.data.prompt_plan import make_plan
from bpgo_video.data.prompt_statistics import prompt_statistics
from bpgo_video.data.shards import PromptShards
from bpgo_video.paths import resolve_folder


def build(args: argparse.Namespace) -> None:
    """Check every line first: a mistake in the last one costs seconds, not the encoding of all before it."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    bar = partial(tqdm, disable=rank > 0)
    plan = make_plan(args.input, args.split, args.max_characters, args.on_error, bar)
    stamp = encoder_stamp(resolve_folder(args.policy), args.max_sequence_length)
    settings = BuildSettings(args.negative_prompt, args.shard_size, args.batch_size, args.dtype)
    job = Build(plan, args.output, encoder(args), stamp, settings)
    if not job.run(rank, world_size, bar):
        print(f"{args.output}: rank {rank} is done; the last rank to end completes the folder", flush=True)
        return
    index = PromptShards(args.output).index
    skipped = index["build"]["skipped"]
    told = f", {skipped} skipped: see {args.output / SKIPPED}" if skipped else ""
    print(f"{args.output}: {index['count']} prompts{told}", flush=True)


def encoder(args: argparse.Namespace) -> Any:
    """The policy's text encoder, loaded when the first text is encoded."""

    @cache
    def policy() -> Any:
        import torch  # heavy imports only once the input is known to be good

        from bpgo_video.policies import load_policy

        show_loading_once()
        local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return load_policy(
            args.policy,
            components=("text_encoder",),
            max_sequence_length=args.max_sequence_length,
            dtype=getattr(torch, args.dtype),
            device=local if args.device == "cuda" else args.device,
        )

    return lambda texts: policy().encode(texts)


def inspect(args: argparse.Namespace) -> None:
    shards = PromptShards(args.directory)
    print(f"{'id':>19}  {'split':<9} {'tags':<16} {'media':<11} prompt | negative prompt of its own")
    for record in islice(shards.records(args.split), args.limit):
        tags, media = ",".join(record.tags), ",".join(record.media)
        texts = [" ".join(text.split()) for text in (record.prompt, record.negative_prompt) if text is not None]
        print(f"{record.id:>19}  {record.split:<9} {tags:<16} {media:<11} {' | '.join(texts)}")


def verify(args: argparse.Namespace) -> None:
    shards = PromptShards(args.directory)
    shards.verify(progress=partial(tqdm, desc="records", unit="record"))
    print(f"{args.directory}: {len(shards)} prompts in {len(shards.index['shards'])} shards are intact")


def stats(args: argparse.Namespace) -> None:
    shards = PromptShards(args.directory)
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
    for name, layout in shards.index["conditioning"].items():
        print(f"tensor      {name} {layout['dtype']} {layout['shape']}")
    priors = sorted(path.stem for path in (shards.directory / "priors").glob("*.json"))
    print(f"priors      {', '.join(priors) or 'none; tools/estimate_priors.py makes them'}")


def counts(table: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in table.items()) or "none"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    commands = top.add_subparsers(dest="command", required=True)
    add_build(commands.add_parser("build", help="encode the prompts of files and write shards"))
    for run, text in (
        (inspect, "print records as a table"),
        (verify, "read every record, compare every hash, decode all media; exit code 0 only when all is intact"),
        (stats, "count splits, tags, lengths, equal and nearly equal prompts, and leaks between splits"),
    ):
        command = commands.add_parser(run.__name__, help=text, description=text)
        command.add_argument("directory", metavar="SHARDS", help="folder, glob, brace range or URL of shards")
        command.set_defaults(run=run)
        if run is inspect:
            command.add_argument("--split", help="only this split")
        if run is not verify:
            command.add_argument("--limit", type=positive, default=20, help="records to print (%(default)s)")
    return top


def add_build(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help='.txt, one prompt a line; .jsonl or .csv with "prompt" and any of negative_prompt, id, split, tags, '
        "image, video; or VBench's .json",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="new folder, or that of the same build, interrupted")
    add("--policy", required=True, metavar="FOLDER", help="diffusers pipeline folder, hub id or package:module/folder")
    add("--split", default="train", help="split of prompts that do not name their own (%(default)s)")
    add("--negative-prompt", default="", metavar="TEXT", help="of prompts that have none of their own (empty)")
    add(
        "--max-sequence-length",
        type=positive,
        default=512,
        metavar="N",
        help="text tokens; must equal the recipe's policy.max_sequence_length (%(default)s, Wan's own)",
    )
    add(
        "--max-characters",
        type=positive,
        default=MAX_CHARACTERS,
        metavar="N",
        help="longer prompts are mistakes: the encoder would drop what exceeds its tokens (%(default)s)",
    )
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help=f"what a prompt does that cannot be used: end the build, or be listed in {SKIPPED} (%(default)s)",
    )
    add("--shard-size", type=positive, default=1000, metavar="N", help="prompts in a shard (%(default)s)")
    add("--batch-size", type=positive, default=32, metavar="N", help="prompts encoded at once (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of encoder and embeddings (%(default)s)")
    add("--device", default="cpu", help="where the encoder runs: cpu, cuda (the rank's own) (%(default)s)")
    command.set_defaults(run=build)


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
