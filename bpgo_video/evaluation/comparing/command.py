"""`bpgo-video evaluate compare`: several models in, a verdict, comparison.json and report.html out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bpgo_video.cli import add_ranks, positive, show_loading_once

if TYPE_CHECKING:  # heavy, and --help needs neither
    from bpgo_video.evaluation.comparing.measuring import Asked, Found


def add_compare(command: argparse.ArgumentParser) -> None:
    """The flags of the subcommand."""
    add = command.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="two or more, the reference first: a diffusers pipeline, a run (its newest checkpoint), a checkpoint, or "
        "a folder of results of an earlier comparison; NAME=MODEL gives it a name",
    )
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="report.html, comparison.json, models/ with all scores",
    )
    add(
        "--config",
        type=Path,
        metavar="RECIPE",
        help="prompts, video size, rewards and deployment settings (a run's own)",
    )
    add("--split", help="split of the prompts (the recipe's evaluation.split)")
    add("--samples-per-prompt", type=positive, metavar="N", help="(the recipe's evaluation.samples_per_prompt)")
    add("--seed", type=int, metavar="S", help="of the noise (the recipe's run.seed)")
    add("--weights", choices=["raw", "ema"], default="raw", help="of checkpoints: themselves, or their average (raw)")
    add("--shown", type=positive, default=24, metavar="N", help="prompts with videos in the report (24)")
    add_ranks(command)
    command.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> None:
    """Results that are there already need neither a recipe nor ranks.

    Raises:
        ValueError, OSError: wrong input, in words.
    """
    from bpgo_video.checkpoints.zero_files import CheckpointError
    from bpgo_video.config.bpgo import ConfigError
    from bpgo_video.evaluation.comparing.comparison import compare, named, write_comparison
    from bpgo_video.evaluation.comparing.measuring import Found
    from bpgo_video.evaluation.comparing.model_scores import holds_scores, read_scores
    from bpgo_video.evaluation.comparing.report import write_report
    from bpgo_video.evaluation.comparing.table import as_table

    if len(args.models) < 2:
        raise ConfigError(f"a comparison needs two models or more, and {len(args.models)} is named")
    asked = named(args.models)
    made = {one: Path(one.source) for one in asked if holds_scores(Path(one.source))}
    found = {one: Found(replace(read_scores(folder), label=one.label), folder) for one, folder in made.items()}
    is_main = True
    if to_measure := [one for one in asked if one not in found]:
        try:
            measured, is_main = measure_them(args, to_measure)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error  # wrong input: told in words
        found |= measured
    if is_main:
        compared = compare([found[one] for one in asked])
        print(as_table(compared))
        print(write_comparison(args.output, compared))
        print(write_report(args.output, compared, shown=args.shown))


def measure_them(args: argparse.Namespace, to_measure: Sequence[Asked]) -> tuple[dict[Asked, Found], bool]:
    """Results of models that have none yet, and whether this is the main rank; every rank calls it."""
    from bpgo_video.evaluation.comparing.comparison import recipe_of
    from bpgo_video.evaluation.comparing.measuring import measure
    from bpgo_video.evaluation.heldout import asked as in_place
    from bpgo_video.evaluation.ranks import ranks_at_work

    config = in_place(
        recipe_of(to_measure, args.config),
        split=args.split,
        samples_per_prompt=args.samples_per_prompt,
        seed=args.seed,
    )
    show_loading_once()
    with ranks_at_work(config.parallel) as mesh:
        results = measure(to_measure, config, args.weights, args.output, mesh)
    return dict(zip(to_measure, results, strict=True)), mesh.is_main
