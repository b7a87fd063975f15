"""What did one model earn on the prompts of a comparison? Its scores by measure, as a folder that is read again.

FOLDER/scores.json        ModelScores: what the scores depend on, the measures, a line per prompt
FOLDER/videos/00003.mp4   the first sample of prompt 3 (prompts from 0, in their order)
FOLDER/parts/             scores of the prompts so far, while some are missing
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from bpgo_video.data.atomic import write_json
from bpgo_video.reports.metrics import MalformedFile

SCORES_FILE = "scores.json"
VIDEOS = "videos"
PLAIN = ConfigDict(extra="forbid", allow_inf_nan=False)

Role = Literal["heldout", "trained", "video"]


@dataclass(frozen=True, config=PLAIN)
class Measure:
    """How videos are measured.

    Attributes:
        role: `heldout`, which nothing was trained on and the verdict is about; `trained`, what a recipe trains on;
            `video`, which says how the videos are and not how good.
        version: changes when the scores do.
        weight: of a trained reward in the training reward.
    """

    role: Role
    version: str
    weight: float = 1.0


@dataclass(frozen=True, config=PLAIN)
class PromptLine:
    """One prompt and the scores of its samples by measure, oriented so that higher is better where that has a sense."""

    id: int
    prompt: str
    tags: list[str]
    scores: dict[str, list[FiniteFloat]]


@dataclass(frozen=True, config=PLAIN)
class ModelScores:
    """One model's scores.

    Attributes:
        label: the model in a few words.
        source: what was named on the command line.
        settings: all that the scores depend on, plain JSON data.
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

    def table(self, measure: str) -> Float[np.ndarray, "prompts samples"]:
        """The scores of one measure."""
        return np.array([line.scores[measure] for line in self.prompts])

    def training_reward(self) -> Float[np.ndarray, "prompts samples"]:
        """The weighted sum of what was trained on: the sum that a training run logs as `reward`."""
        trained = {name: measure for name, measure in self.measures.items() if measure.role == "trained"}
        return np.sum([measure.weight * self.table(name) for name, measure in trained.items()], axis=0)


def holds_scores(path: Path) -> bool:
    """Whether `path` is a folder of results already made."""
    return (path / SCORES_FILE).is_file()


def read_scores(folder: Path) -> ModelScores:
    """
    Raises:
        MalformedFile: scores.json is not what this program writes; the message names it.
    """
    path = folder / SCORES_FILE
    try:
        found = TypeAdapter(ModelScores).validate_json(path.read_bytes())
    except ValidationError as error:
        raise MalformedFile(f"{path}: {error}") from error
    counts = {len(values) for line in found.prompts for values in line.scores.values()}
    if (
        not found.prompts
        or len(counts) != 1
        or any(line.scores.keys() != found.measures.keys() for line in found.prompts)
    ):
        raise MalformedFile(f"{path}: every prompt needs equally many scores of each of {sorted(found.measures)}")
    return found


def write_scores(folder: Path, scores: ModelScores) -> None:
    write_json(folder / SCORES_FILE, TypeAdapter(ModelScores).dump_python(scores, mode="json"))


def video_path(folder: Path, row: int) -> Path:
    """Where the first sample of the prompt in `row` is."""
    return folder / VIDEOS / f"{row:05d}.mp4"


class PairingError(ValueError):
    """Results that cannot be compared; the message says what differs."""


def check_paired(models: Sequence[ModelScores]) -> None:
    """Whether all models were measured in one way on the same prompts; seeds and samples may differ.

    Raises:
        PairingError: names the two models and what differs.
    """
    first = models[0]
    for other in models[1:]:
        pair = f"{first.label} ({first.source}) and {other.label} ({other.source})"
        if [(line.id, line.prompt) for line in first.prompts] != [(line.id, line.prompt) for line in other.prompts]:
            raise PairingError(f"{pair} have scores of other prompts; measure one of them again on those of the other")
        if first.measures != other.measures:
            raise PairingError(
                f"{pair} were measured by other rewards: {sorted(first.measures)} and {sorted(other.measures)}, or "
                "other versions or weights of them; measure one of them again with the recipe of the other"
            )
        if differing := [
            f"{name} {first.settings['deployment'][name]} and {other.settings['deployment'].get(name)}"
            for name in first.settings["deployment"]
            if first.settings["deployment"][name] != other.settings["deployment"].get(name)
        ]:
            raise PairingError(f"{pair} made videos in other ways: {', '.join(differing)}; measure one of them again")


def same_noise(a: ModelScores, b: ModelScores) -> bool:
    """Whether sample s of a prompt started from the same noise in both."""
    return bool(a.settings["seed"] == b.settings["seed"])
