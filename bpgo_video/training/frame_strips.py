"""Which frame scored what? The scores of a video's frames, before and after training, as cells beneath its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired

from pydantic import FiniteFloat
from typing_extensions import TypedDict


class FrameRow(TypedDict):
    """One reward's scores of a sample's frames: seconds from the first frame, and a score for each."""

    times: list[FiniteFloat]
    before: NotRequired[list[FiniteFloat]]
    after: list[FiniteFloat]


@dataclass(frozen=True)
class Cell:
    """A frame's score; `share` is where it lies between the reward's lowest and highest on the page, 0 to 1."""

    time: float
    score: float
    share: float


@dataclass(frozen=True)
class CellRow:
    """Cells of one video by one reward."""

    reward: str
    side: str
    cells: Sequence[Cell]

    @property
    def words(self) -> str:
        return ", ".join(f"{cell.time:.2f} s {cell.score:.3g}" for cell in self.cells)


def cell_rows(samples: Sequence[Mapping[str, FrameRow]]) -> list[list[CellRow]]:
    """For each sample its rows, reward by reward, before and after; shades compare all samples of a reward."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        for name, row in sample.items():
            values.setdefault(name, []).extend([*row.get("before", []), *row["after"]])
    limits = {name: (min(scores), max(scores)) for name, scores in values.items() if scores}
    return [
        [
            CellRow(name, side, _cells(row["times"], scores, *limits[name]))
            for name, row in sample.items()
            for side, scores in (("before", row.get("before", [])), ("after", row["after"]))
            if scores
        ]
        for sample in samples
    ]


def _cells(times: Sequence[float], scores: Sequence[float], low: float, high: float) -> list[Cell]:
    width = (high - low) or 1.0
    return [Cell(time, score, (score - low) / width) for time, score in zip(times, scores, strict=True)]
