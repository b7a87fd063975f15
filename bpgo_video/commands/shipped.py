"""Commands for what ships with the package: its recipes, and the demo that runs one of them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from inspect import getdoc
from pathlib import Path

from filelock import FileLock

from bpgo_video.cli import Parser, become_launcher, help_of, positive, run_command
from bpgo_video.commands import prompts
from bpgo_video.config.reading import DS_CONFIGS, PACKAGE, RECIPES, read_yaml, recipe_file, shipped, to_yaml

RECIPE = "tiny_wan_bpgo"
PROMPTS = PACKAGE / "tiny" / "prompts.jsonl"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def recipes(words: Sequence[str], script: str | None = None) -> int:
    """List, show and copy the recipes that ship with the package.

        bpgo-video recipes
        bpgo-video recipes show tiny_wan_bpgo
        bpgo-video recipes copy wan21_1.3b_480p_8x80gb my_recipe.yaml

    Every command that takes a recipe takes the name of a shipped one or a file, and so does `base:` in a recipe.
    """
    top = Parser(**help_of("recipes", getdoc(recipes), script))
    top.set_defaults(run=list_all)
    commands = top.add_subparsers()
    for run, text in ((show, "print a recipe"), (copy, "write a recipe to a file that you can edit")):
        command = commands.add_parser(run.__name__, help=text, description=text)
        command.add_argument("name", metavar="NAME", help="name of a shipped recipe")
        command.set_defaults(run=run)
    command.add_argument("file", nargs="?", type=Path, metavar="FILE", help="new file (NAME.yaml)")
    return run_command(top, words)


def list_all(args: argparse.Namespace) -> None:
    names = shipped(RECIPES)
    width = max(map(len, names))
    for name in names:
        first_line = recipe_file(name).read_text("utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first_line.removeprefix('# ')}")
    print(f"\nDeepSpeed configurations, for `deepspeed:` in a recipe: {', '.join(shipped(DS_CONFIGS))}")


def show(args: argparse.Namespace) -> None:
    print(recipe_file(args.name).read_text("utf-8"), end="")


def copy(args: argparse.Namespace) -> None:
    source = recipe_file(args.name)
    file = args.file or Path(source.name)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(source.read_text("utf-8"))
    except FileExistsError:
        raise FileExistsError(f"{file} exists and is not overwritten; name another FILE") from None
    print(f"{file}: edit it, then run bpgo-video train {file}")


def demo(words: Sequence[str], script: str | None = None) -> int:
    """Post-train the embedded video policy with BPGO in minutes, on any CPU: prompts, priors, training, report.

        bpgo-video demo
        bpgo-video demo --dir runs/demo-1 --seed 1
        bpgo-video demo --ranks 1

    Embeds the package's 96 prompts, measures their priors, and trains the recipe tiny_wan_bpgo. Prompts and priors are
    kept in demo-prompts next to the run folder, and made again after a change of the package's prompts, policy or
    recipe. To continue an interrupted run, repeat the command. The result is DIR/report.html.
    """
    parser = Parser(**help_of("demo", getdoc(demo), script))
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="run folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (%(default)s)")
    parser.add_argument("--ranks", type=positive, default=2, metavar="N", help="processes of one thread (%(default)s)")
    parser.add_argument("--prepare", action="store_true", help="make prompts and priors without training")
    parser.set_defaults(run=run_demo)
    return run_command(parser, words)


def run_demo(args: argparse.Namespace) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folder = args.dir.parent / "demo-prompts"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # demos of several seeds share the folder
        build_prompts(folder)
        measure_priors(folder, args.ranks)
    if not args.prepare:
        flags = ["--run.dir", str(args.dir), "--run.seed", str(args.seed), "--data.shards", str(folder)]
        become_launcher("train", args.ranks, [RECIPE, *flags, "--run.resume", "auto"])


def build_prompts(folder: Path) -> None:
    """Shards of the package's prompts; replaces shards of other prompts or of another policy."""
    policy = read_yaml(Path(RECIPE)).policy
    words = ["build", "--input", str(PROMPTS), "--output", str(folder), "--policy", policy.folder]
    if code := prompts.main([*words, "--max-sequence-length", str(policy.max_sequence_length), "--overwrite"]):
        raise SystemExit(code)


def measure_priors(folder: Path, ranks: int) -> None:
    """Priors of the prompts, measured again after a change of the recipe."""
    recipe, measured = to_yaml(read_yaml(Path(RECIPE))), folder / "priors" / "recipe.yaml"
    if measured.is_file() and measured.read_text("utf-8") == recipe:
        return
    command = [sys.executable, "-m", "bpgo_video", "priors", RECIPE, "--ranks", str(ranks)]
    if code := subprocess.run([*command, "--data.shards", str(folder)]).returncode:
        raise SystemExit(code)  # the ranks have printed the error
    measured.write_text(recipe, "utf-8")
