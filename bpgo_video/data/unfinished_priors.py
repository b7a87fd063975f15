"""What has an estimation of priors found before it was broken off? Scores of whole batches, beside the priors.

SHARDS/priors/unfinished.jsonl   {"key": what the scores depend on}, then {"id", "scores": {reward: [...]}} a prompt
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpgo_video.atomic import atomic_file

Found = dict[int, dict[str, list[float]]]  # prompt id -> reward name -> a score per sample


@dataclass(frozen=True)
class UnfinishedPriors:
    """The notes of one estimation; one rank reads and writes them.

    Attributes:
        key: plain JSON data; notes of another key are of no use, and are replaced.
    """

    directory: Path
    key: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return self.directory / "priors" / "unfinished.jsonl"

    def begin(self) -> Found:
        """What is there; a file of another key, and a line that a kill cut short, make room for new notes."""
        head = json.dumps({"key": self.key}, sort_keys=True) + "\n"
        lines = self.path.read_text("utf-8").splitlines(keepends=True) if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("\n")] if lines[:1] == [head] else [head]
        with atomic_file(self.path) as aside:
            aside.write_text("".join(kept), "utf-8")
        notes = map(json.loads, kept[1:])
        return {note["id"]: note["scores"] for note in notes}

    def add(self, found: Found) -> None:
        """Notes of more prompts, on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"id": id_, "scores": scores}) + "\n" for id_, scores in found.items())
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
