"""Scores of one model on the prompts of a comparison, as a folder.

FOLDER/scores.json        ModelScores: what the scores depend on, the measures, a line per prompt
FOLDER/videos/00003.mp4   the first sample of prompt 3 (prompts from 0, in order)
FOLDER/parts/             scores of the prompts so far, while some are missing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict, FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from bpgo_video.data.atomic import write_json
from bpgo_video.evaluation.files import checked
from bpgo_video.reports.metrics import MalformedFile

SCORES_FILE = "scores.json"
TRAINING_REWARD = "training reward"  # a name that no recipe's reward can have
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
REMEDY = "delete it, and what it held is measured again"

Role = Literal["heldout", "trained", "video"]
Table = Float[np.ndarray, "prompts samples"]


class PairingError(ValueError):
    """Scores that cannot be compared; the message says what differs."""


@checked_dataclass(frozen=True, config=STRICT)
class Measure:
    """How videos are measured.

    Attributes:
        role: `heldout`, which no recipe trained on and the verdict is about; `trained`, what a recipe trains on;
            `video`, which describes the videos and not how good they are.
        version: changes when the scores do.
        weight: of a trained reward in the training reward.
    """

    role: Role
    version: str
    weight: float = 1.0


@checked_dataclass(frozen=True, config=STRICT)
class PromptLine:
    """One prompt and the scores of its samples by measure; higher is better, where better means something."""

    id: int
    prompt: str
    tags: list[str]
    scores: dict[str, list[FiniteFloat]]


@checked_dataclass(frozen=True, config=STRICT)
class ModelScores:
    """One model's scores.

    Attributes:
        label: the model in a few words.
        source: what was named on the command line.
        settings: everything that the scores depend on, plain JSON data.
        run, step: the run's folder and its finished steps, for a training checkpoint.
        starts_from: fingerprint of the pipeline that a checkpoint's run started from, or of the pipeline itself.
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

    def of_role(self, role: Role) -> list[str]:
        return [name for name, measure in self.measures.items() if measure.role == role]

    def table(self, measure: str) -> Table:
        """The scores of one measure, or TRAINING_REWARD."""
        if measure == TRAINING_REWARD:  # the weighted sum that a training run logs as `reward`
            trained = self.of_role("trained")
            return np.sum([self.measures[name].weight * self.table(name) for name in trained], axis=0)
        return np.array([line.scores[measure] for line in self.prompts])

    def tables(self) -> dict[str, Table]:
        """The scores of every measure, followed by the training reward if it is a sum of several."""
        total = [TRAINING_REWARD] if len(self.of_role("trained")) > 1 else []
        return {name: self.table(name) for name in [*self.measures, *total]}


@dataclass(frozen=True)
class Scored:
    """A model's scores and the folder that holds them and its videos."""

    scores: ModelScores
    folder: Path

    def video(self, row: int) -> Path:
        """The first sample of the prompt in this row."""
        return video_path(self.folder, row)


def video_path(folder: Path, row: int) -> Path:
    return folder / "videos" / f"{row:05d}.mp4"


def holds_scores(folder: Path) -> bool:
    return (folder / SCORES_FILE).is_file()


def read_scores(folder: Path, **named: str) -> Scored:
    """A folder's scores, with another label or source if these are `named`. Raises MalformedFile."""
    path = folder / SCORES_FILE
    found = checked(TypeAdapter(ModelScores), path.read_bytes(), path, REMEDY)
    counts = {len(values) for line in found.prompts for values in line.scores.values()}
    if len(counts) != 1 or any(line.scores.keys() != found.measures.keys() for line in found.prompts):
        raise MalformedFile(f"{path}: each prompt needs equally many scores of {sorted(found.measures)}; {REMEDY}")
    return Scored(replace(found, **named), folder)


def write_scores(folder: Path, scores: ModelScores) -> None:
    write_json(folder / SCORES_FILE, TypeAdapter(ModelScores).dump_python(scores, mode="json"))


def check_paired(models: Sequence[ModelScores]) -> None:
    """Checks that all models were measured in one way on the same prompts; seeds and samples may differ.

    Raises:
        PairingError: names the two models and what differs.
    """
    first, *others = models
    for other in others:
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
