"""Which of several models is better? Results of all, paired and compared with the first; comparison.json.

compare A B [C ...]: A is the reference. Each model is a diffusers pipeline, a run, a checkpoint, or a folder of results
that an earlier comparison made (OUTPUT/models/KEY).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bpgo_video.checkpoints import checkpoint
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.reading import read_recipe, read_yaml
from bpgo_video.config.sft import Recipe
from bpgo_video.data.atomic import write_json
from bpgo_video.evaluation.comparing.matching import Match, Point, matched
from bpgo_video.evaluation.comparing.measuring import Asked, Found
from bpgo_video.evaluation.comparing.model_scores import ModelScores, check_paired, same_noise
from bpgo_video.evaluation.comparing.paired import LEVEL, RESAMPLES, Effect, Scores, as_family, effect
from bpgo_video.evaluation.comparing.verdict import TRAINING_REWARD, Comparison, headline, notes

COMPARISON_FILE = "comparison.json"
EXPORTS = ("export", "export-ema")


@dataclass(frozen=True)
class Matching:
    """A run's curve and another model at equal training reward; `match` is None where the curve has no such point."""

    run: str
    other: str
    match: Match | None


@dataclass(frozen=True)
class Compared:
    """All that is known of several models.

    Attributes:
        models: the reference first.
        comparisons: of every other model with it.
    """

    models: Sequence[Found]
    comparisons: Sequence[Comparison]
    matchings: Sequence[Matching]


def named(arguments: Sequence[str]) -> list[Asked]:
    """Models of the command line, `PATH` or `NAME=PATH`, with labels that tell them apart."""
    asked: list[Asked] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        given = bool(equals) and "/" not in name
        source, label = (path, name) if given else (argument, default_label(argument))
        used = [one.label for one in asked]
        number = next(n for n in range(1, len(used) + 2) if (label if n == 1 else f"{label} ({n})") not in used)
        asked.append(Asked(source, label if number == 1 else f"{label} ({number})"))
    return asked


def default_label(source: str) -> str:
    """`RUN step-000050` for a checkpoint, `RUN/export` for an export, else the folder's own name."""
    parts = [part for part in source.replace(":", "/").split("/") if part not in ("", ".")]
    if len(parts) >= 3 and parts[-2] == "checkpoints":
        return f"{parts[-3]} {parts[-1]}"
    return "/".join(parts[-2:]) if parts[-1] in EXPORTS else parts[-1]


def recipe_of(asked: Sequence[Asked], config: Path | None) -> Config:
    """The recipe that says how videos are made and scored: the given one, or that of the first run among the models.

    Raises:
        ConfigError: neither.
    """
    if config is not None:
        return read_yaml(config)
    for one in asked:
        recipe = own_recipe(Path(one.source).expanduser())
        if isinstance(recipe, Config):  # a warm start has no rewards to measure by
            return recipe
    raise ConfigError("none of the models is a run with rewards: name the recipe to measure them by with --config")


def own_recipe(path: Path) -> Recipe | None:
    """The recipe of the run that is at `path`, or that a checkpoint or an export there belongs to."""
    if path.parent.name == checkpoint.FOLDER:
        path = path.parents[1]
    elif path.name in EXPORTS:
        path = path.parent
    file = path / "config.yaml"
    return read_recipe(file) if file.is_file() else None


def tables(scores: ModelScores) -> dict[str, Scores]:
    """Every measure's scores, and behind them the training reward where it is a sum of several."""
    found: dict[str, Scores] = {name: scores.table(name) for name in scores.measures}
    if sum(measure.role == "trained" for measure in scores.measures.values()) > 1:
        found[TRAINING_REWARD] = scores.training_reward()
    return found


def compare(models: Sequence[Found]) -> Compared:
    """Every model against the first; p values hold for all measures of all models together.

    Raises:
        PairingError: results of other prompts, rewards or settings.
    """
    check_paired([model.scores for model in models])
    reference, others = models[0].scores, [model.scores for model in models[1:]]
    first = tables(reference)
    effects = [{name: effect(first[name], table) for name, table in tables(other).items()} for other in others]
    family = iter(as_family([one for by_measure in effects for one in by_measure.values()]))
    comparisons = [
        Comparison(
            reference=reference.label,
            candidate=other.label,
            measures=reference.measures,
            effects={name: next(family) for name in by_measure},
            by_tag=by_tag(reference, other),
            same_noise=same_noise(reference, other),
        )
        for other, by_measure in zip(others, effects, strict=True)
    ]
    return Compared(models, comparisons, matchings([model.scores for model in models]))


def by_tag(reference: ModelScores, other: ModelScores) -> dict[str, dict[str, Effect]]:
    """Effects on the prompts of each tag; every one stands for itself."""
    first, second = tables(reference), tables(other)
    found = {}
    for tag in sorted({tag for line in reference.prompts for tag in line.tags}):
        rows = np.array([tag in line.tags for line in reference.prompts])
        found[tag] = {name: effect(first[name][rows], second[name][rows]) for name in first}
    return found


def matchings(models: Sequence[ModelScores]) -> list[Matching]:
    """Each run's curve with each model of no or another run, but what it started from."""
    found = []
    for run in dict.fromkeys(model.run for model in models if model.run is not None):
        curve = [model for model in models if on_the_way(model, run, models)]
        curve.sort(key=lambda model: model.step or 0)
        if len(curve) < 2:
            continue
        others = [model for model in models if model not in curve]
        found += [
            Matching(Path(run).name, other.label, matched([point(one) for one in curve], point(other)))
            for other in others
        ]
    return found


def on_the_way(model: ModelScores, run: str, models: Sequence[ModelScores]) -> bool:
    """Whether a model is a checkpoint of a run, or what the run started from; seeds must agree along a curve."""
    own = next(other for other in models if other.run == run)
    start = model.run is None and model.settings["pipeline"] == own.starts_from
    return (model.run == run or start) and same_noise(model, own)


def point(scores: ModelScores) -> Point:
    names = [name for name, measure in scores.measures.items() if measure.role == "heldout"]
    return Point(scores.step or 0, scores.training_reward(), {name: scores.table(name) for name in names})


def as_json(compared: Compared) -> dict[str, Any]:
    """comparison.json: plain JSON data; per-sample scores are in each model's scores.json."""
    reference = compared.models[0].scores
    return {
        "level": LEVEL,
        "resamples": RESAMPLES,
        "prompts": len(reference.prompts),
        "deployment": reference.settings["deployment"],
        "measures": {name: asdict(measure) for name, measure in reference.measures.items()},
        "models": [model_json(model) for model in compared.models],
        "comparisons": [comparison_json(one) for one in compared.comparisons],
        "matched": [
            {
                "run": one.run,
                "other": one.other,
                "match": one.match
                and {**asdict(replace(one.match, effects={})), "effects": effects_json(one.match.effects)},
            }
            for one in compared.matchings
        ],
    }


def model_json(model: Found) -> dict[str, Any]:
    scores = model.scores
    return {
        "label": scores.label,
        "source": scores.source,
        "results": str(model.folder),
        "run": scores.run,
        "step": scores.step,
        "seed": scores.settings["seed"],
        "samples_per_prompt": scores.settings["samples_per_prompt"],
        "means": {name: float(table.mean()) for name, table in tables(scores).items()},
    }


def comparison_json(one: Comparison) -> dict[str, Any]:
    return {
        "reference": one.reference,
        "candidate": one.candidate,
        "outcome": one.outcome,
        "verdict": headline(one),
        "notes": notes(one),
        "same_noise": one.same_noise,
        "effects": effects_json(one.effects),
        "by_tag": {tag: effects_json(effects) for tag, effects in one.by_tag.items()},
    }


def effects_json(effects: Mapping[str, Effect]) -> dict[str, dict[str, Any]]:
    return {name: {**asdict(effect), "shown": effect.shown} for name, effect in effects.items()}


def write_comparison(output: Path, compared: Compared) -> Path:
    """Writes comparison.json; its path."""
    path = output / COMPARISON_FILE
    write_json(path, as_json(compared))
    return path
