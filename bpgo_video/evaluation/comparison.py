"""Scores of models on the prompts of a comparison, the folder that keeps them, and what their comparison shows.

FOLDER/scores.json        ModelScores: settings that the scores depend on, the measures, one line per prompt
FOLDER/videos/00003.mp4   the first sample of prompt 3 (prompts are numbered from 0, in order)
FOLDER/parts/             scores of the prompts so far, while some are missing

The verdict is about held-out measures and claims no more than the statistics show. In addition, models are compared at
equal training reward: a run that trained longer, or at a higher learning rate, has a higher training reward, and this
comparison shows whether it also paid more for it. A run's curve passes through its starting policy and its checkpoints.
Where it first crosses model B's training reward, between checkpoints i and i + 1,

    t = (r_B - r_i) / (r_{i+1} - r_i),    h[p] = (1 - t) h_i[p] + t h_{i+1}[p]

and B's held-out scores are compared with h prompt by prompt. r is a mean over prompts and samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from bpgo_video.data.records import PromptRecord
from bpgo_video.documents import MalformedFile, read_json
from bpgo_video.errors import InputError
from bpgo_video.files import write_json
from bpgo_video.statistics import LEVEL, RESAMPLES, Effect, can_show, corrected, effect, too_few

TRAINING_REWARD = "training reward"  # recipes cannot name a reward so
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
REMEDY = "delete it to measure its content again"

Role = Literal["heldout", "trained", "video"]
Table = Float[np.ndarray, "prompts samples"]


@checked_dataclass(frozen=True, config=STRICT)
class Measure:
    """A measure of videos.

    Attributes:
        role: `heldout` measures decide the verdict, and no recipe trains on them; recipes train on `trained` ones;
            `video` measures describe the videos and are neither good nor bad.
        version: changes when the scores do.
        weight: of a trained reward in the training reward.
    """

    role: Role
    version: str
    weight: float = 1.0


@checked_dataclass(frozen=True, config=STRICT)
class PromptLine:
    """One prompt and the scores of its samples by measure; higher is better, except for `video` measures."""

    id: int
    prompt: str
    tags: list[str]
    scores: dict[str, list[FiniteFloat]]


@checked_dataclass(frozen=True, config=STRICT)
class ModelScores:
    """One model's scores.

    Attributes:
        label: short name of the model.
        source: the model's path on the command line.
        settings: all settings that the scores depend on, as plain JSON data.
        run, step: the run directory and its finished steps, for a training checkpoint.
        starts_from: fingerprint of the pipeline that a checkpoint's run started from, or of the pipeline itself.
        folder: the folder of the scores; not part of the file.
    """

    label: str
    source: str
    settings: dict[str, Any]
    measures: dict[str, Measure]
    prompts: list[PromptLine]
    starts_from: str
    run: str | None = None
    step: int | None = None
    form: Literal[1] = 1
    folder: Annotated[Path, Field(exclude=True)] = field(default=Path(), compare=False)

    @property
    def roles(self) -> dict[str, Role]:
        """The role of every measure, and last of TRAINING_REWARD if there are several trained rewards."""
        roles = {name: measure.role for name, measure in self.measures.items()}
        several = list(roles.values()).count("trained") > 1
        return {**roles, TRAINING_REWARD: "trained"} if several else roles

    def table(self, measure: str) -> Table:
        """The scores of one measure, or of TRAINING_REWARD: the weighted sum that a training run logs as `reward`."""
        if measure != TRAINING_REWARD:
            return np.array([line.scores[measure] for line in self.prompts])
        trained = {name: own.weight for name, own in self.measures.items() if own.role == "trained"}
        return np.sum([weight * self.table(name) for name, weight in trained.items()], axis=0)

    def prompt_means(self, measure: str) -> Float[np.ndarray, "prompts"]:
        return self.table(measure).mean(axis=1)


SCORES, LINES = TypeAdapter(ModelScores), TypeAdapter(list[PromptLine])


def lines_of(records: Sequence[PromptRecord], by_name: Mapping[str, Tensor]) -> list[PromptLine]:
    """The lines of prompts whose scores are the rows of tensors."""
    columns = {name: scores.tolist() for name, scores in by_name.items()}
    return [
        PromptLine(record.id, record.prompt, list(record.tags), {name: rows[row] for name, rows in columns.items()})
        for row, record in enumerate(records)
    ]


def has_scores(folder: Path) -> bool:
    """Whether the folder has the scores of all prompts."""
    return (folder / "scores.json").is_file()


def read_scores(folder: Path, **changes: str) -> ModelScores:
    """The scores in a folder; `changes` replace its label or source. Raises MalformedFile."""
    path = folder / "scores.json"
    scores = read_json(SCORES, path, REMEDY)
    counts = {len(values) for line in scores.prompts for values in line.scores.values()}
    if len(counts) != 1 or any(line.scores.keys() != scores.measures.keys() for line in scores.prompts):
        raise MalformedFile(f"{path}: every prompt needs as many scores of {sorted(scores.measures)}; {REMEDY}")
    return replace(scores, folder=folder, **changes)


def write_scores(scores: ModelScores) -> None:
    write_json(scores.folder / "scores.json", SCORES.dump_python(scores, mode="json"))
    shutil.rmtree(scores.folder / "parts", ignore_errors=True)


def read_parts(folder: Path) -> dict[int, PromptLine]:
    """The prompts measured so far, by id. Raises MalformedFile."""
    parts = [read_json(LINES, path, REMEDY) for path in sorted(folder.glob("parts/*.json"))]
    return {line.id: line for lines in parts for line in lines}


def write_part(folder: Path, number: int, lines: Sequence[PromptLine]) -> None:
    write_json(folder / "parts" / f"{number:05d}.json", LINES.dump_python(list(lines), mode="json"))


def video_path(folder: Path, row: int) -> Path:
    """The first sample of the prompt in this row."""
    return folder / "videos" / f"{row:05d}.mp4"


MOTION, DIVERSITY = "pixel_motion", "pixel_diversity"

COLLAPSE = (  # a statistic that falls, what that says, and what it may mean
    (MOTION, "Videos move less", "policies that exploit their rewards often stop moving."),
    (DIVERSITY, "Samples of one prompt are more alike", "check whether they are all the same video (collapse)."),
)

Effects = Mapping[str, Effect]  # by measure


class PairingError(InputError):
    """Two models' scores cannot be compared; the message names the difference."""


@dataclass(frozen=True)
class Comparison:
    """A candidate compared with the reference.

    Attributes:
        tests: number of tests that the p values are corrected for: all measures of all candidates.
        roles: of the measures, TRAINING_REWARD included if there are several trained rewards.
        effects: after that correction.
        by_tag: effects on the prompts of each tag; without a correction.
        same_noise: samples of both models started from the same noise.
    """

    reference: str
    candidate: str
    tests: int
    roles: Mapping[str, Role]
    effects: Effects
    by_tag: Mapping[str, Effects]
    same_noise: bool

    @property
    def heldout(self) -> Effects:
        return {name: effect for name, effect in self.effects.items() if self.roles[name] == "heldout"}

    @property
    def outcome(self) -> str:
        shown = {effect.shown for effect in self.heldout.values()} - {0}
        if len(shown) == 2:
            return "mixed"
        return {1: "better", -1: "worse"}[shown.pop()] if shown else "no difference shown"

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        up, down, same = (
            ", ".join(f"held-out {name} {effect}" for name, effect in self.heldout.items() if effect.shown == sign)
            for sign in (1, -1, 0)
        )
        a, b = self.reference, self.candidate
        return {
            "better": f"{b} is better than {a}: {up}",
            "worse": f"{b} is worse than {a}: {down}",
            "mixed": f"{b} is better than {a} in some held-out measures and worse in others: {up}; {down}",
            "no difference shown": f"No difference shown between {a} and {b}: {same}",
        }[self.outcome]

    @property
    def notes(self) -> list[str]:
        """Sentences on what may mislead."""
        return [*self._alarms(), *self._limits()]

    def _alarms(self) -> Iterator[str]:
        """Patterns of a policy that exploits its rewards."""
        training = [effect for name, effect in self.effects.items() if self.roles[name] == "trained"][-1:]
        if training and training[0].shown == 1 and self.outcome in ("worse", "no difference shown"):
            rest = "held-out scores fell" if self.outcome == "worse" else "no held-out score is shown to have risen"
            yield (
                f"The training reward rose by {training[0].difference:.3f} and {rest}: the candidate may exploit its "
                "training reward. Look at the biggest losses, and compare earlier checkpoints."
            )
        for name, change, meaning in COLLAPSE:
            if (effect := self.effects.get(name)) is not None and effect.shown == -1:
                share = -effect.difference / abs(effect.mean_a)  # the mean is above 0, since it fell
                means = f"from {effect.mean_a:.3f} to {effect.mean_b:.3f}"
                yield f"{change}: {name} fell by {share:.0%}, {means}; {meaning}"

    def _limits(self) -> Iterator[str]:
        """Limits of what this comparison can show."""
        name = next(iter(self.heldout))
        known = {tag: effects[name] for tag, effects in self.by_tag.items() if effects[name].low is not None}
        if known:
            worst, best = (choose(known, key=lambda tag: known[tag].difference) for choose in (min, max))
            if (known[worst].high or 0.0) < (known[best].low or 0.0):
                yield (
                    f"Prompts differ by tag: {name} changed by {known[best]} on {best!r} prompts and by {known[worst]} "
                    f"on {worst!r} prompts."
                )
        measured = self.heldout[name]
        words = can_show(measured.prompts, self.tests, measured.detectable)
        if too_few(measured.prompts, self.tests):
            yield f"{words}: use more prompts (evaluation.max_prompts, or a larger split)."
        elif words and self.outcome == "no difference shown":
            yield f"{words} ({name}): use more prompts to show a smaller one."
        if not self.same_noise:
            yield "The models were sampled from different seeds: pairs share a prompt but no noise, which shows less."


@dataclass(frozen=True)
class Match:
    """The point of a run's curve that has another model's training reward.

    Attributes:
        step: interpolated between checkpoints.
        reward: the training reward of both.
        effects: by held-out measure; positive where the other model is higher.
    """

    step: float
    reward: float
    effects: Effects


@dataclass(frozen=True)
class Matching:
    """A run's curve and another model; `match` is None if the curve does not cross the model's training reward."""

    run: str
    other: str
    match: Match | None

    def __str__(self) -> str:
        if self.match is None:
            return f"{self.run} never has the training reward of {self.other} between its checkpoints here."
        differences = ", ".join(f"{name} {effect}" for name, effect in self.match.effects.items())
        return (
            f"At the training reward of {self.other}, {self.match.reward:.3f}, which {self.run} has at step "
            f"{self.match.step:.0f}, {self.other} differs from it in held-out measures by: {differences}."
        )


@dataclass(frozen=True)
class Compared:
    """Several models, the reference first; the comparison of each other model with it; matches by training reward."""

    models: Sequence[ModelScores]
    comparisons: Sequence[Comparison]
    matchings: Sequence[Matching]

    @property
    def notes(self) -> list[str]:
        """Sentences on what may mislead, each once; one that is not about all candidates names them."""
        about: dict[str, list[str]] = {}
        for one in self.comparisons:
            for note in one.notes:
                about.setdefault(note, []).append(one.candidate)
        every = len(self.comparisons)
        return [note if len(names) == every else f"{' and '.join(names)}: {note}" for note, names in about.items()]


def compare(models: Sequence[ModelScores]) -> Compared:
    """Compares every model with the first; p values are corrected for all measures of all models together.

    Raises:
        PairingError: scores of different prompts, rewards or settings.
    """
    first, *others = models
    for other in others:
        check_paired(first, other)
    tests = len(others) * len(first.roles)
    tags = sorted({tag for line in first.prompts for tag in line.tags})
    comparisons = []
    for other in others:
        effects = {name: corrected(one, tests) for name, one in effects_of(first, other).items()}
        by_tag = {tag: effects_of(first, other, [tag in line.tags for line in first.prompts]) for tag in tags}
        noise = same_noise(first, other)
        comparisons.append(Comparison(first.label, other.label, tests, first.roles, effects, by_tag, noise))
    return Compared(models, comparisons, match_runs(models))


def check_paired(first: ModelScores, other: ModelScores) -> None:
    """Checks that both were measured in the same way on the same prompts; seeds and samples may differ.

    Raises:
        PairingError: names the two models and the difference.
    """
    pair = f"{first.label} ({first.source}) and {other.label} ({other.source})"
    if [(line.id, line.prompt) for line in first.prompts] != [(line.id, line.prompt) for line in other.prompts]:
        raise PairingError(f"{pair} have scores of different prompts; measure one of them again")
    if first.measures != other.measures:
        raise PairingError(
            f"{pair} were measured by different rewards: {sorted(first.measures)} and {sorted(other.measures)}, or "
            "different versions or weights of them; measure one of them again with the recipe of the other"
        )
    ours, theirs = first.settings["deployment"], other.settings["deployment"]
    if different := [f"{key} {ours[key]} and {theirs.get(key)}" for key in ours if ours[key] != theirs.get(key)]:
        raise PairingError(f"{pair} generated videos differently: {', '.join(different)}; measure one of them again")


def same_noise(a: ModelScores, b: ModelScores) -> bool:
    """Whether sample s of a prompt started from the same noise in both."""
    return bool(a.settings["seed"] == b.settings["seed"])


def effects_of(first: ModelScores, other: ModelScores, rows: Any = slice(None)) -> dict[str, Effect]:
    """The effects of all measures on some rows of the prompts."""
    return {name: effect(first.table(name)[rows], other.table(name)[rows]) for name in first.roles}


def match_runs(models: Sequence[ModelScores]) -> list[Matching]:
    """Each run's curve with each model outside it."""
    matchings = []
    for run in dict.fromkeys(model.run for model in models if model.run is not None):
        own = next(model for model in models if model.run == run)
        curve = [  # its checkpoints and the pipeline that it started from, sampled with one seed
            model
            for model in models
            if same_noise(model, own)
            and (model.run == run or (model.run is None and model.settings["pipeline"] == own.starts_from))
        ]
        curve.sort(key=lambda model: model.step or 0)
        if len(curve) > 1:
            others = [model for model in models if model not in curve]
            matchings += [Matching(Path(run).name, other.label, match_reward(curve, other)) for other in others]
    return matchings


def match_reward(curve: Sequence[ModelScores], other: ModelScores) -> Match | None:
    """The point where a curve, sorted by step, first has another model's training reward."""
    reward = float(other.table(TRAINING_REWARD).mean())
    for before, after in pairwise(curve):
        low, high = (float(model.table(TRAINING_REWARD).mean()) for model in (before, after))
        if low != high and min(low, high) <= reward <= max(low, high):
            share, effects = (reward - low) / (high - low), {}
            for name in [name for name, role in other.roles.items() if role == "heldout"]:
                ends = [model.table(name).mean(axis=1, keepdims=True) for model in (before, after)]
                effects[name] = effect((1 - share) * ends[0] + share * ends[1], other.table(name))
            start, end = before.step or 0, after.step or 0
            return Match(start + share * (end - start), reward, effects)
    return None


def write_comparison(output: Path, compared: Compared) -> Path:
    """Writes comparison.json; the scores of samples are in each model's scores.json. Returns its path."""
    first = compared.models[0]
    content = {
        "level": LEVEL,
        "resamples": RESAMPLES,
        "prompts": len(first.prompts),
        "deployment": first.settings["deployment"],
        "measures": {name: asdict(measure) for name, measure in first.measures.items()},
        "models": [
            {
                **{name: getattr(model, name) for name in ("label", "source", "run", "step")},
                **{name: model.settings[name] for name in ("seed", "samples_per_prompt")},
                "results": str(model.folder),
                "means": {name: float(model.table(name).mean()) for name in model.roles},
            }
            for model in compared.models
        ],
        "comparisons": [
            {"outcome": one.outcome, "verdict": one.verdict, "notes": one.notes}
            | {name: value for name, value in asdict(one).items() if name != "roles"}
            for one in compared.comparisons
        ],
        "matched": [asdict(one) for one in compared.matchings],
    }
    write_json(path := output / "comparison.json", content)
    return path
