"""Post-train the embedded video policy with BPGO in minutes, on any CPU: prompts, priors, training, report.

    bpgo-video demo
    bpgo-video demo --dir runs/demo-1 --seed 1
    bpgo-video demo --ranks 1

Embeds the package's 96 prompts, measures their priors, and trains the recipe tiny_wan_bpgo. Prompts and priors are kept
in demo-prompts next to the run folder, and made again after a change of the package's prompts, policy or recipe. To
continue an interrupted run, repeat the command. The result is DIR/report.html.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

import bpgo_video
from bpgo_video.cli import Parser, help_of, positive, run_command
from bpgo_video.config.reading import read_yaml, to_yaml
from bpgo_video.launching import become_launcher

RECIPE = "tiny_wan_bpgo"
PROMPTS = Path(bpgo_video.__file__).parent / "tiny" / "prompts.jsonl"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def build_prompts(folder: Path) -> None:
    """Shards of the package's prompts; replaces shards of other prompts or of another policy."""
    from bpgo_video.commands import prompts  # imports torch, which reads the environment set before

    policy = read_yaml(Path(RECIPE)).policy
    words = ["build", "--input", str(PROMPTS), "--output", str(folder), "--policy", policy.folder]
    build = prompts.parser().parse_args([*words, "--max-sequence-length", str(policy.max_sequence_length)])
    try:
        build.run(build)
    except FileExistsError:
        if not (folder / "index.json").is_file():
            raise
        shutil.rmtree(folder)
        build.run(build)


def measure_priors(folder: Path, ranks: int) -> None:
    """Priors of the prompts, measured again after a change of the recipe."""
    recipe, measured = to_yaml(read_yaml(Path(RECIPE))), folder / "priors" / "recipe.yaml"
    if measured.is_file() and measured.read_text("utf-8") == recipe:
        return
    command = [sys.executable, "-m", "bpgo_video.commands.priors", "--ranks", str(ranks)]
    if code := subprocess.run([*command, "--config", RECIPE, "--data.shards", str(folder)]).returncode:
        raise SystemExit(code)  # the ranks have printed the error
    measured.write_text(recipe, "utf-8")


def demo(args: argparse.Namespace) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folder = args.dir.parent / "demo-prompts"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # demos of several seeds share the folder
        build_prompts(folder)
        measure_priors(folder, args.ranks)
    if not args.prepare:
        flags = ["--run.dir", str(args.dir), "--run.seed", str(args.seed), "--data.shards", str(folder)]
        become_launcher("bpgo_video.train", args.ranks, ["--config", RECIPE, *flags, "--run.resume", "auto"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(**help_of("demo", __doc__))
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="run folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (%(default)s)")
    parser.add_argument("--ranks", type=positive, default=2, metavar="N", help="processes of one thread (%(default)s)")
    parser.add_argument("--prepare", action="store_true", help="make prompts and priors without training")
    parser.set_defaults(run=demo)
    return run_command(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
