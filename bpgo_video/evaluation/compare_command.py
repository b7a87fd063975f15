"""`bpgo-video evaluate compare`: several models in; a verdict, comparison.json and report.html out."""

from __future__ import annotations

import argparse
from pathlib import Path

from bpgo_video.cli import add_ranks, positive

MODELS = (
    "two or more, the reference first: a diffusers pipeline, a run (its newest checkpoint), a checkpoint, or a folder "
    "of scores of an earlier comparison (OUTPUT/models/KEY); NAME=MODEL gives it a name"
)


def add_compare(command: argparse.ArgumentParser) -> None:
    """The flags of the subcommand."""
    add, recipe = command.add_argument, "prompts, video size, rewards and deployment settings (a run's own)"
    add_ranks(command)
    add("models", nargs="+", metavar="MODEL", help=MODELS)
    add("--output", type=Path, required=True, metavar="DIR", help="report.html, comparison.json, models/ with scores")
    add("--config", type=Path, metavar="RECIPE", help=recipe)
    add("--split", help="split of the prompts (the recipe's evaluation.split)")
    add("--samples-per-prompt", type=positive, metavar="N", help="(the recipe's evaluation.samples_per_prompt)")
    add("--seed", type=int, metavar="S", help="of the noise (the recipe's run.seed)")
    add("--weights", choices=["raw", "ema"], default="raw", help="of checkpoints: themselves, or their average (raw)")
    add("--shown", type=positive, default=24, metavar="N", help="prompts with videos in the report (24)")
    command.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> None:
    from bpgo_video.evaluation.compare_run import run  # heavy, and --help should be quick

    run(args)
