"""Scores of one model on the prompts of a comparison, and the folder that keeps them.

FOLDER/scores.json        ModelScores: settings that the scores depend on, the measures, one line per prompt
FOLDER/videos/00003.mp4   the first sample of prompt 3 (prompts are numbered from 0, in order)
FOLDER/parts/             scores of the prompts so far, while some are missing
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor

from bpgo_video.data.records import PromptRecord
from bpgo_video.files import write_json
from bpgo_video.training.metrics import MalformedFile, parse_json

TRAINING_REWARD = "training reward"  # recipes cannot name a reward so
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
REMEDY = "delete it to measure its content again"

Role = Literal["heldout", "trained", "video"]
Table = Float[np.ndarray, "prompts samples"]


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class PromptLine:
    """One prompt and the scores of its samples by measure; higher is better, except for `video` measures."""

    id: int
    prompt: str
    tags: list[str]
    scores: dict[str, list[FiniteFloat]]


@dataclass(frozen=True, config=STRICT)
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
    scores = parse_json(SCORES, path.read_bytes(), path, REMEDY)
    counts = {len(values) for line in scores.prompts for values in line.scores.values()}
    if len(counts) != 1 or any(line.scores.keys() != scores.measures.keys() for line in scores.prompts):
        raise MalformedFile(f"{path}: every prompt needs as many scores of {sorted(scores.measures)}; {REMEDY}")
    return replace(scores, folder=folder, **changes)


def write_scores(scores: ModelScores) -> None:
    write_json(scores.folder / "scores.json", SCORES.dump_python(scores, mode="json"))
    shutil.rmtree(scores.folder / "parts", ignore_errors=True)


def read_parts(folder: Path) -> dict[int, PromptLine]:
    """The prompts measured so far, by id. Raises MalformedFile."""
    parts = [parse_json(LINES, path.read_bytes(), path, REMEDY) for path in sorted(folder.glob("parts/*.json"))]
    return {line.id: line for lines in parts for line in lines}


def write_part(folder: Path, number: int, lines: Sequence[PromptLine]) -> None:
    write_json(folder / "parts" / f"{number:05d}.json", LINES.dump_python(list(lines), mode="json"))


def video_path(folder: Path, row: int) -> Path:
    """The first sample of the prompt in this row."""
    return folder / "videos" / f"{row:05d}.mp4"
