"""What has a scoring measured so far? A line for each video, kept beside the result file until that is whole.

FILE.json.measured/{dimension}-{hex}.jsonl      of one process; what a kill cut short is measured again

A line has a key: a hash of all that its number depends on. Lines of other keys are not read.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bpgo_video.evaluation.vbench.dimension import Measured
from bpgo_video.evaluation.vbench.result_files import ResultError


@dataclass(frozen=True)
class Line:
    """One video's number.

    Attributes:
        video: the file's name, for readers.
    """

    key: str
    video: str
    measured: Measured


LINE = TypeAdapter(Line)
Keep = Callable[[Line], None]


def kept_beside(output: Path) -> Path:
    """The folder of a result file's lines."""
    return output.with_name(f"{output.name}.measured")


@contextmanager
def keeping(folder: Path, dimension: str) -> Iterator[Keep]:
    """Yield what writes this process's lines, each as it comes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{dimension}-{secrets.token_hex(4)}.jsonl").open("x", encoding="utf-8") as file:

        def keep(line: Line) -> None:
            file.write(json.dumps(asdict(line), allow_nan=False) + "\n")
            file.flush()

        yield keep


def read_kept(folder: Path, dimension: str) -> dict[str, Measured]:
    """All lines of a dimension, by their keys; a last one without an end is left out.

    Raises:
        ResultError: a line is of another form.
    """
    found = {}
    for path in _files(folder, dimension):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                read = LINE.validate_json(line)
            except ValidationError as error:
                raise ResultError(
                    f"{path}, line {number} is no line of a scoring: {error}; delete the file, and its videos are "
                    "measured again"
                ) from error
            found[read.key] = read.measured
    return found


def drop_kept(folder: Path, dimensions: Sequence[str]) -> None:
    """Delete the lines of these dimensions, and the folder where no others are left."""
    for dimension in dimensions:
        for path in _files(folder, dimension):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _files(folder: Path, dimension: str) -> list[Path]:
    return sorted(folder.glob(f"{dimension}-*.jsonl"))
