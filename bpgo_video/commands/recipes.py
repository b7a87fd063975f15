"""List, show and copy the recipes that ship with the package.

    bpgo-video recipes
    bpgo-video recipes show tiny_wan_bpgo
    bpgo-video recipes copy wan21_1.3b_480p_8x80gb my_recipe.yaml

Every --config takes the name of a shipped recipe or a file, and so does `base:` in a recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bpgo_video.cli import Parser, help_of, run_command
from bpgo_video.config.shipped import DS_CONFIGS, RECIPES, recipe_file, shipped


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
    print(f"{file}: edit it, then run bpgo-video train --config {file}")


def parser() -> argparse.ArgumentParser:
    top = Parser(**help_of("recipes", __doc__))
    top.set_defaults(run=list_all)
    commands = top.add_subparsers()
    for run, text in ((show, "print a recipe"), (copy, "write a recipe to a file that you can edit")):
        command = commands.add_parser(run.__name__, help=text, description=text)
        command.add_argument("name", metavar="NAME", help="name of a shipped recipe")
        command.set_defaults(run=run)
    command.add_argument("file", nargs="?", type=Path, metavar="FILE", help="new file (NAME.yaml)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
