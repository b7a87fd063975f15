"""Reader of offline wandb runs: .wandb files in LevelDB's log format with wandb's record types."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, WHOLE, LAST = 32768, 7, 1, 4


def records(path: Path) -> Iterator[Record]:
    """The complete records; a record that crosses a block boundary of the file is split into pieces."""
    content, offset, pieces = path.read_bytes(), HEADER, b""
    while offset < len(content):
        if (left := BLOCK - offset % BLOCK) < HEADER:
            offset += left
            continue
        if offset + HEADER > len(content):
            return
        length, kind = struct.unpack("<4xHB", content[offset : offset + HEADER])
        if offset + HEADER + length > len(content):
            return
        pieces += content[offset + HEADER : offset + HEADER + length]
        offset += HEADER + length
        if kind in (WHOLE, LAST):
            yield Record.FromString(pieces)
            pieces = b""


def finished_records(folder: Path) -> list[Record]:
    """All records of one offline run; wandb's process may write the last ones after `finish` returns."""
    (path,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 60
    while True:
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)


def history(folder: Path) -> list[dict[str, Any]]:
    """The steps of one offline run, in order: values by key; nested keys are joined by dots."""
    every = finished_records(folder)
    rows = [record.history.item for record in every if record.WhichOneof("record_type") == "history"]
    return [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table of one offline run; a video's cell is the bytes of its copy."""
    every = finished_records(folder)
    artifacts = [record.artifact for record in every if record.WhichOneof("record_type") == "artifact"]
    files = {entry.path: Path(entry.local_path) for artifact in artifacts for entry in artifact.manifest.contents}
    content = json.loads(files[f"{name}.table.json"].read_text())
    return [
        {column: files[cell["path"]].read_bytes() if isinstance(cell, dict) else cell for column, cell in row}
        for row in (zip(content["columns"], line, strict=True) for line in content["data"])
    ]


def offline_runs(run_dir: Path) -> list[Path]:
    """Folders of the offline runs of a run directory, the oldest first."""
    return sorted((run_dir / "wandb").glob("offline-run-*"))
