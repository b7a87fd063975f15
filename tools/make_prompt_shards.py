"""Make prompt shards for training from text files, and look at them.

    python tools/make_prompt_shards.py build --input prompts.txt --output shards --policy FOLDER
    python tools/make_prompt_shards.py inspect shards
    python tools/make_prompt_shards.py verify shards
    python tools/make_prompt_shards.py stats shards

Embeddings are computed once, by the policy's own text encoder; no file in a shard is a pickle.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from bpgo_video.cli import positive, run_command
from bpgo_video.data.build import build_shards, check_prompts
from bpgo_video.data.fingerprint import encoder_stamp
from bpgo_video.data.shards import PromptShards


def build(args: argparse.Namespace) -> None:
    """Check every line first: a mistake in the last one costs seconds, not the encoding of all before it."""
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise FileExistsError(f"{args.output} exists and is not empty; name another --output, or delete it first")
    count = check_prompts(args.input, args.split)
    import torch  # heavy imports only once the input is known to be good

    from bpgo_video.policies import load_policy

    policy = load_policy(
        args.policy,
        components=("text_encoder",),
        max_sequence_length=args.max_sequence_length,
        dtype=getattr(torch, args.dtype),
        device=args.device,
    )
    build_shards(
        args.input,
        args.output,
        policy.encode,
        encoder_stamp(policy.folder, policy.max_sequence_length),
        split=args.split,
        negative_prompt=args.negative_prompt,
        shard_size=args.shard_size,
        batch_size=args.batch_size,
        progress=partial(tqdm, total=count, desc="prompts", unit="prompt"),
    )
    print(f"{args.output}: {count} prompts")


def inspect(args: argparse.Namespace) -> None:
    shards = PromptShards(args.directory)
    print(f"{'id':>19}  {'split':<9} {'tags':<16} prompt")
    for record in islice(shards.records(args.split), args.limit):
        print(f"{record.id:>19}  {record.split:<9} {','.join(record.tags):<16} {record.prompt}")


def verify(args: argparse.Namespace) -> None:
    shards = PromptShards(args.directory)
    shards.verify(progress=partial(tqdm, desc="records", unit="record"))
    print(f"{args.directory}: {len(shards)} prompts in {len(shards.index['shards'])} shards are intact")


def stats(args: argparse.Namespace) -> None:
    shards = PromptShards(args.directory)
    tags: Counter[str] = Counter()
    texts: Counter[int] = Counter()
    lengths: Counter[int] = Counter()
    for record in tqdm(shards.records(), total=len(shards), desc="records", unit="record"):
        tags.update(record.tags)
        texts[hash(record.prompt)] += 1
        lengths[len(record.prompt)] += 1
    ordered = sorted(lengths.elements())
    print(f"prompts     {len(shards)} in {len(shards.index['shards'])} shards")
    print(f"splits      {counts(shards.splits)}")
    print(f"tags        {counts(tags)}")
    print(f"characters  {ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}")
    print(f"repeated    {sum(texts.values()) - len(texts)} prompts have the text of another")
    print(f"encoder     {shards.policy.name} {shards.policy.fingerprint}, {shards.policy.max_sequence_length} tokens")
    for name, layout in shards.index["conditioning"].items():
        print(f"tensor      {name} {layout['dtype']} {layout['shape']}")
    priors = sorted(path.stem for path in (shards.directory / "priors").glob("*.json"))
    print(f"priors      {', '.join(priors) or 'none; tools/estimate_priors.py makes them'}")


def counts(table: Counter[str] | dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in table.items()) or "none"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    add_build(commands.add_parser("build", help="encode the prompts of text files and write shards"))
    for run, text in (
        (inspect, "print records as a table"),
        (verify, "read every record and compare every hash; exit code 0 only when all is intact"),
        (stats, "count splits, tags, lengths and repeated prompts"),
    ):
        command = commands.add_parser(run.__name__, help=text, description=text)
        command.add_argument("directory", type=Path, metavar="DIR", help="directory of shards")
        command.set_defaults(run=run)
        if run is inspect:
            command.add_argument("--split", help="only this split")
            command.add_argument("--limit", type=positive, default=20, help="records to print (%(default)s)")
    return top


def add_build(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help='.txt, one prompt a line; or .jsonl, {"prompt", "id"?, "split"?, "tags"?} a line',
    )
    add("--output", type=Path, required=True, metavar="DIR", help="new directory; an existing one is refused")
    add("--policy", required=True, metavar="FOLDER", help="diffusers pipeline folder, hub id or package:module/folder")
    add("--split", default="train", help="split of prompts that do not name their own (%(default)s)")
    add("--negative-prompt", default="", metavar="TEXT", help="what guidance steers away from (empty)")
    add(
        "--max-sequence-length",
        type=positive,
        default=512,
        metavar="N",
        help="text tokens; must equal the recipe's policy.max_sequence_length (%(default)s, Wan's own)",
    )
    add("--shard-size", type=positive, default=1000, metavar="N", help="prompts in a shard (%(default)s)")
    add("--batch-size", type=positive, default=32, metavar="N", help="prompts encoded at once (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of encoder and embeddings (%(default)s)")
    add("--device", default="cpu", help="where the encoder runs: cpu, cuda (%(default)s)")
    command.set_defaults(run=build)


def main(arguments: list[str] | None = None) -> int:
    return run_command(parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
