"""Measure a policy.

    bpgo-video evaluate heldout --config tiny_wan_bpgo --policy runs/demo/export --output scores.json
    bpgo-video evaluate compare package:bpgo_video.tiny/weights/wan runs/demo --output runs/comparison --ranks 2

    bpgo-video evaluate layout --policy runs/demo --suite vbench --output videos --seed 0 --ranks 8
    bpgo-video evaluate layout --check --suite vbench --output videos
    bpgo-video evaluate score --videos videos --suite vbench --dimensions temporal_flickering --output scores.json
    bpgo-video evaluate vbench --python VBENCH_PYTHON --videos videos --suite vbench --output results
    bpgo-video evaluate total results --json

heldout scores a policy folder on the recipe's held-out prompts with its `evaluation.rewards`: the same function,
prompts and noise as the evaluations within a training run. The standard error is over samples, the prompts being fixed.

compare measures two models or more alike, on the same prompts and noise, and says which is better: a verdict in words,
paired statistics in comparison.json, and report.html with the videos side by side (docs/evaluation.md).

layout, score, vbench and total are VBench's videos, dimensions and totals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bpgo_video.cli import Parser, add_ranks, help_of, positive, run_command, show_loading_once
from bpgo_video.evaluation.compare_command import add_compare
from bpgo_video.evaluation.vbench_commands import add_vbench_commands


def heldout(args: argparse.Namespace) -> None:
    """Rewards and models are loaded only after the command line is valid."""
    from bpgo_video.atomic import write_json
    from bpgo_video.config.reading import read_yaml
    from bpgo_video.evaluation.heldout import as_json, as_table, evaluate_folder, with_changes
    from bpgo_video.evaluation.ranks import ranks_at_work

    config = with_changes(
        read_yaml(args.config),
        policy=args.policy,
        split=args.split,
        samples_per_prompt=args.samples_per_prompt,
        seed=args.seed,
    )
    show_loading_once()
    with ranks_at_work(config.parallel) as mesh:
        evaluation = evaluate_folder(config, mesh)
    if mesh.is_main:
        print(as_table(evaluation))
        if args.output is not None:
            write_json(args.output, as_json(evaluation))
            print(args.output)


def parser(script: str | None = None) -> argparse.ArgumentParser:
    top = Parser(**help_of("evaluate", __doc__, script), formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher appends it
    commands = top.add_subparsers(dest="command", required=True)
    add_heldout(commands.add_parser("heldout", help="score a policy folder on a recipe's held-out prompts"))
    add_vbench_commands(commands)
    add_compare(commands.add_parser("compare", help="which of several models is better, with statistics and a report"))
    top.set_defaults(module="bpgo_video.commands.evaluate")
    return top


def add_heldout(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--config", type=Path, required=True, metavar="RECIPE", help="a training recipe, or the config.yaml of a run")
    add("--policy", metavar="FOLDER", help="diffusers pipeline, such as RUN/export (the recipe's policy.folder)")
    add("--split", help="split of the prompts (the recipe's evaluation.split)")
    add("--samples-per-prompt", type=positive, metavar="N", help="(the recipe's evaluation.samples_per_prompt)")
    add("--seed", type=int, metavar="S", help="of the noise (the recipe's run.seed)")
    add("--output", type=Path, metavar="FILE.json", help="settings, summary and every score; no file without it")
    add_ranks(command)
    command.set_defaults(run=heldout)


def main(arguments: Sequence[str] | None = None, script: str | None = None) -> int:
    return run_command(parser(script), arguments)


if __name__ == "__main__":
    sys.exit(main())
