"""Scores of one model on the prompts of a comparison, as a folder.

FOLDER/scores.json        ModelScores: what the scores depend on, the measures, a line per prompt
FOLDER/videos/00003.mp4   the first sample of prompt 3 (prompts from 0, in order)
FOLDER/parts/             scores of the prompts so far, while some are missing
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict, FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from bpgo_video.atomic import write_json
from bpgo_video.data.records import PromptRecord
from bpgo_video.evaluation.files import checked
from bpgo_video.training.metrics import MalformedFile

TRAINING_REWARD = "training reward"  # a name that no recipe's reward can have
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
REMEDY = "delete it, and what it held is measured again"

Role = Literal["heldout", "trained", "video"]
Table = Float[np.ndarray, "prompts samples"]


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


def lines_of(records: Sequence[PromptRecord], by_name: Mapping[str, Tensor]) -> list[PromptLine]:
    """The lines of prompts whose scores are the rows of tensors."""
    columns = {name: scores.tolist() for name, scores in by_name.items()}
    return [
        PromptLine(one.id, one.prompt, list(one.tags), {name: rows[place] for name, rows in columns.items()})
        for place, one in enumerate(records)
    ]


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

    @property
    def roles(self) -> dict[str, Role]:
        """The role of every measure; the training reward follows if it is a sum of several."""
        roles = {name: measure.role for name, measure in self.measures.items()}
        several = list(roles.values()).count("trained") > 1
        return {**roles, TRAINING_REWARD: "trained"} if several else roles

    def table(self, measure: str) -> Table:
        """The scores of one measure, or TRAINING_REWARD: the weighted sum that a training run logs as `reward`."""
        if measure != TRAINING_REWARD:
            return np.array([line.scores[measure] for line in self.prompts])
        trained = of_role("trained", self.roles)
        return np.sum([self.measures[name].weight * self.table(name) for name in trained if name != measure], axis=0)

    def tables(self) -> dict[str, Table]:
        return {name: self.table(name) for name in self.roles}


def of_role(role: Role, roles: Mapping[str, Role]) -> list[str]:
    return [name for name, own in roles.items() if own == role]


SCORES, LINES = TypeAdapter(ModelScores), TypeAdapter(list[PromptLine])


@dataclass(frozen=True)
class ScoresFolder:
    """The folder of one model's scores."""

    path: Path

    @property
    def complete(self) -> bool:
        return (self.path / "scores.json").is_file()

    def read(self, **named: str) -> Scored:
        """The scores, with another label or source if these are `named`. Raises MalformedFile."""
        path = self.path / "scores.json"
        found = checked(SCORES, path.read_bytes(), path, REMEDY)
        counts = {len(values) for line in found.prompts for values in line.scores.values()}
        if len(counts) != 1 or any(line.scores.keys() != found.measures.keys() for line in found.prompts):
            raise MalformedFile(f"{path}: each prompt needs equally many scores of {sorted(found.measures)}; {REMEDY}")
        return Scored(replace(found, **named), self)

    def write(self, scores: ModelScores) -> None:
        write_json(self.path / "scores.json", SCORES.dump_python(scores, mode="json"))
        if (parts := self.path / "parts").is_dir():
            shutil.rmtree(parts)

    def read_parts(self) -> dict[int, PromptLine]:
        """The prompts measured so far, by id. Raises MalformedFile."""
        parts = [checked(LINES, path.read_bytes(), path, REMEDY) for path in sorted(self.path.glob("parts/*.json"))]
        return {line.id: line for lines in parts for line in lines}

    def write_part(self, number: int, lines: Sequence[PromptLine]) -> None:
        write_json(self.path / "parts" / f"{number:05d}.json", LINES.dump_python(list(lines), mode="json"))

    def video(self, row: int) -> Path:
        """The first sample of the prompt in this row."""
        return self.path / "videos" / f"{row:05d}.mp4"


@dataclass(frozen=True)
class Scored:
    """A model's scores, and the folder of its videos."""

    scores: ModelScores
    folder: ScoresFolder
