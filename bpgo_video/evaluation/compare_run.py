"""A comparison from the command line to its files: which models, by which recipe, measured or read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bpgo_video.cli import show_loading_once
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.reading import read_recipe, read_yaml
from bpgo_video.distributed.zero_files import CheckpointError
from bpgo_video.evaluation.compare import compare
from bpgo_video.evaluation.compare_measure import Request, measure
from bpgo_video.evaluation.compare_report import as_table, write_report
from bpgo_video.evaluation.compare_scores import Scored, ScoresFolder
from bpgo_video.evaluation.compare_verdict import write_comparison
from bpgo_video.evaluation.heldout import with_changes
from bpgo_video.evaluation.ranks import ranks_at_work

EXPORTS = ("export", "export-ema")


def run(args: argparse.Namespace) -> None:
    """Scores that exist need neither a recipe nor ranks."""
    if len(args.models) < 2:
        raise ConfigError(f"a comparison needs two models or more, and {len(args.models)} is named")
    requests, is_main = labelled(args.models), True
    folders = {one: ScoresFolder(Path(one.source)) for one in requests}
    scored = {one: folder.read(label=one.label) for one, folder in folders.items() if folder.complete}
    if rest := [one for one in requests if one not in scored]:
        measured, is_main = measure_all(args, rest)
        scored |= measured
    if is_main:
        compared = compare([scored[one] for one in requests])
        print(as_table(compared))
        print(write_comparison(args.output, compared))
        print(write_report(args.output, compared, shown=args.shown))


def measure_all(args: argparse.Namespace, requests: Sequence[Request]) -> tuple[dict[Request, Scored], bool]:
    """The scores of models that have none yet, and whether this is the main rank; every rank calls it."""
    changes = {"split": args.split, "samples_per_prompt": args.samples_per_prompt, "seed": args.seed}
    config = with_changes(recipe_of(requests, args.config), **changes)
    show_loading_once()
    try:
        with ranks_at_work(config.parallel) as mesh:
            scored = measure(requests, config, args.weights, args.output, mesh)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error  # wrong input
    return dict(zip(requests, scored, strict=True)), mesh.is_main


def labelled(arguments: Sequence[str]) -> list[Request]:
    """Models of the command line, `PATH` or `NAME=PATH`, with distinct labels."""
    requests: list[Request] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        source, label = (path, name) if equals and "/" not in name else (argument, default_label(argument))
        used = [one.label for one in requests]
        numbered = (label, *(f"{label} ({number})" for number in range(2, len(used) + 2)))
        requests.append(Request(source, next(one for one in numbered if one not in used)))
    return requests


def default_label(source: str) -> str:
    """`RUN step-000050` for a checkpoint, `RUN/export` for an export, else the folder's own name."""
    parts = [part for part in source.replace(":", "/").split("/") if part not in ("", ".")]
    if len(parts) >= 3 and parts[-2] == "checkpoints":
        return f"{parts[-3]} {parts[-1]}"
    return "/".join(parts[-2:]) if parts[-1] in EXPORTS else parts[-1]


def recipe_of(requests: Sequence[Request], config: Path | None) -> Config:
    """The recipe that says how videos are made and scored: the given one, or that of the first run among the models.

    A run is also known by a checkpoint or an export of it. One of kind sft has no rewards to measure by.

    Raises:
        ConfigError: there is neither.
    """
    if config is not None:
        return read_yaml(config)
    for one in requests:
        path = Path(one.source).expanduser()
        run = path.parents[1] if path.parent.name == "checkpoints" else path.parent if path.name in EXPORTS else path
        if (run / "config.yaml").is_file() and isinstance(recipe := read_recipe(run / "config.yaml"), Config):
            return recipe
    raise ConfigError("none of the models is a run with rewards: name the recipe to measure them by with --config")
