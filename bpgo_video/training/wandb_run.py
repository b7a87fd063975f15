"""What of a run goes to wandb? Its records, the held-out videos, and a table of them before and after."""

from __future__ import annotations

import importlib
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from bpgo_video.config.run import WandbConfig

WANDB_ID_FILE = "wandb_run_id.txt"

Cell = str | float | Path


def without_home(folder: Path) -> None:
    """Where a user's home cannot be found or written, at which wandb fails, it keeps its files in `folder`."""
    with suppress(RuntimeError):  # neither HOME nor a name for this user, as in many containers
        if os.access(Path.home(), os.W_OK):
            return
    os.environ.setdefault("HOME", str(folder))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(folder / "wandb"))
    print(f"wandb: this user's home cannot be written, so {folder}/wandb has what would lie there", file=sys.stderr)


class WandbRun:
    """A run of wandb's, under the id that the run directory keeps, for a resume to continue; asks for no key.

    What is sent at one step is one record of wandb's.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self, run_dir: Path, settings: WandbConfig, config: Mapping[str, Any] | None) -> None:
        without_home(run_dir)
        try:
            self._wandb = importlib.import_module("wandb")  # a run without a project must not import it
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"wandb project {settings.project!r} is configured, but wandb is not installed: pip install wandb"
            ) from error
        id_file = run_dir / WANDB_ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        mode = settings.mode or "online"
        if mode == "online" and not self._wandb.login(prompt=False, verify=False):
            print("wandb: no API key found, this run is recorded offline", file=sys.stderr)
            mode = "offline"
        self._run = self._wandb.init(
            project=settings.project,
            name=settings.name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume=None if mode == "offline" else "allow",
            mode=mode,
            dir=run_dir,
            config=to_jsonable_python(config or {}),
        )

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        self._run.log(dict(values), step=step)

    def media(self, step: int, name: str, videos: Sequence[tuple[Path, str]]) -> None:
        """(mp4 path, caption) pairs; wandb copies the files."""
        self._run.log({name: [self._video(path, caption) for path, caption in videos]}, step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """Rows of the same keys, which are the columns. A file that is gone leaves its cell empty."""
        columns = list(rows[0])
        data = [[self._cell(row[column]) for column in columns] for row in rows]
        self._run.log({name: self._wandb.Table(columns=columns, data=data)}, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _cell(self, value: Cell) -> Any:
        if not isinstance(value, Path):
            return value
        return self._video(value) if value.is_file() else None

    def _video(self, path: Path, caption: str | None = None) -> Any:
        return self._wandb.Video(str(path), caption=caption, format="mp4")
