"""Several models compared with the first: paired effects of every measure, by tag, and at equal training reward.

At equal training reward: a run that trained longer, or at a higher learning rate, has more of what it was trained on;
whether it also paid more for it shows where rewards are equal. A run's curve goes through its starting policy and its
checkpoints. Where it first crosses model B's training reward, between checkpoints i and i + 1,

    t = (r_B - r_i) / (r_{i+1} - r_i),    h[p] = (1 - t) h_i[p] + t h_{i+1}[p]

and B's held-out scores are compared with h prompt by prompt. r is a mean over prompts and samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bpgo_video.evaluation.compare_scores import TRAINING_REWARD, ModelScores, Role, Scored, of_role
from bpgo_video.statistics import Effect, as_family, effect

Effects = Mapping[str, Effect]  # by measure


class PairingError(ValueError):
    """Scores that cannot be compared; the message says what differs."""


@dataclass(frozen=True)
class Comparison:
    """A candidate compared with a reference.

    Attributes:
        roles: of the measures; TRAINING_REWARD is among them if several rewards were trained on.
        effects: of one family.
        by_tag: of the prompts of each tag; not part of the family.
        same_noise: samples of both started from the same noise.
    """

    reference: str
    candidate: str
    roles: Mapping[str, Role]
    effects: Effects
    by_tag: Mapping[str, Effects]
    same_noise: bool

    @property
    def heldout(self) -> Effects:
        return {name: self.effects[name] for name in of_role("heldout", self.roles)}

    @property
    def outcome(self) -> str:
        shown = {effect.shown for effect in self.heldout.values()} - {0}
        if len(shown) == 2:
            return "mixed"
        return {1: "better", -1: "worse"}[shown.pop()] if shown else "no difference shown"


@dataclass(frozen=True)
class Match:
    """The point of a run's curve that has another model's training reward.

    Attributes:
        step: between checkpoints, by interpolation.
        reward: the training reward of both.
        effects: by held-out measure; positive where the other model is higher.
    """

    step: float
    reward: float
    effects: Effects


@dataclass(frozen=True)
class Matching:
    """A run's curve and another model; `match` is None if the curve never has the model's training reward."""

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
    """Several models, the reference first, and the comparison of each other one with it."""

    models: Sequence[Scored]
    comparisons: Sequence[Comparison]
    matchings: Sequence[Matching]


def compare(models: Sequence[Scored]) -> Compared:
    """Compares every model with the first; p values hold for all measures of all models together.

    Raises:
        PairingError: scores of different prompts, rewards or settings.
    """
    first, *others = scores = [model.scores for model in models]
    for other in others:
        check_paired(first, other)
    family = iter(as_family([one for other in others for one in effects_of(first, other).values()]))
    comparisons = []
    for other in others:
        effects = {name: next(family) for name in first.roles}
        noise = same_noise(first, other)
        comparisons.append(Comparison(first.label, other.label, first.roles, effects, by_tag(first, other), noise))
    return Compared(models, comparisons, matchings(scores))


def check_paired(first: ModelScores, other: ModelScores) -> None:
    """Checks that both were measured in one way on the same prompts; seeds and samples may differ.

    Raises:
        PairingError: names the two models and what differs.
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
        raise PairingError(f"{pair} made videos differently: {', '.join(different)}; measure one of them again")


def same_noise(a: ModelScores, b: ModelScores) -> bool:
    """Whether sample s of a prompt started from the same noise in both."""
    return bool(a.settings["seed"] == b.settings["seed"])


def effects_of(first: ModelScores, other: ModelScores, rows: Any = slice(None)) -> dict[str, Effect]:
    """The effects of all measures, on some prompts."""
    tables = other.tables()
    return {name: effect(table[rows], tables[name][rows]) for name, table in first.tables().items()}


def by_tag(first: ModelScores, other: ModelScores) -> dict[str, dict[str, Effect]]:
    tags = sorted({tag for line in first.prompts for tag in line.tags})
    return {tag: effects_of(first, other, [tag in line.tags for line in first.prompts]) for tag in tags}


def matchings(models: Sequence[ModelScores]) -> list[Matching]:
    """Each run's curve with each model that is not on it."""
    found = []
    for run in dict.fromkeys(model.run for model in models if model.run is not None):
        curve = sorted((model for model in models if on_curve(model, run, models)), key=lambda model: model.step or 0)
        if len(curve) > 1:
            others = [model for model in models if model not in curve]
            found += [Matching(Path(run).name, other.label, matched(curve, other)) for other in others]
    return found


def on_curve(model: ModelScores, run: str, models: Sequence[ModelScores]) -> bool:
    """Whether a model is a checkpoint of a run, or what the run started from; seeds must agree along a curve."""
    own = next(other for other in models if other.run == run)
    starts = model.run is None and model.settings["pipeline"] == own.starts_from
    return (model.run == run or starts) and same_noise(model, own)


def matched(curve: Sequence[ModelScores], other: ModelScores) -> Match | None:
    """Where a curve, in the order of its steps, first has another model's training reward."""
    reward = float(other.table(TRAINING_REWARD).mean())
    for before, after in pairwise(curve):
        low, high = (float(model.table(TRAINING_REWARD).mean()) for model in (before, after))
        if low != high and min(low, high) <= reward <= max(low, high):
            share, effects = (reward - low) / (high - low), {}
            for name in of_role("heldout", other.roles):
                ends = [model.table(name).mean(axis=1, keepdims=True) for model in (before, after)]
                effects[name] = effect((1 - share) * ends[0] + share * ends[1], other.table(name))
            start, end = before.step or 0, after.step or 0
            return Match(start + share * (end - start), reward, effects)
    return None
